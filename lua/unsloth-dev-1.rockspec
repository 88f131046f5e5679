-- luarocks make lua/unsloth-dev-1.rockspec      from the root of the repository; needs what tests/install_packages.sh installs
rockspec_format = "3.0"
package = "unsloth"
version = "dev-1"
source = { url = "git+file://." }
description = {
  summary = "Fine-tunes large language models from Lua",
  detailed = "LoRA on 4-bit weights, full fine-tuning, chat templates, GGUF and safetensors in and out, on the CPU or a GPU, in one C module.",
  license = "Apache-2.0",
}
supported_platforms = { "linux" }
dependencies = { "lua ~> 5.4" }
build = {
  type = "command",
  -- A module that holds the library, so that the rock needs nothing beside what the system's packages give. USL_ROCK_BUILD: the
  -- build folder; USL_ROCK_FLAGS: what cmake gets, such as -DUSL_CUDA=ON.
  build_command = "cmake -B ${USL_ROCK_BUILD:-build/rock} ${USL_ROCK_FLAGS--DUSL_TESTS=OFF} "
    .. "&& cmake --build ${USL_ROCK_BUILD:-build/rock} --target unsloth_rock -j 2",
  install_command = "cmake -E make_directory $(LUADIR) $(LIBDIR) && cmake -E copy_directory lua/unsloth $(LUADIR)/unsloth "
    .. "&& cmake -E copy_directory lua/meta $(LUADIR)/meta && cmake -E copy ${USL_ROCK_BUILD:-build/rock}/rock/unsloth.so $(LIBDIR)/unsloth.so",
}
