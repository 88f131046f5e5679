# `cmake --install`, `find_package(unsloth)`, `pkg-config unsloth` and the Debian package (`cpack` in the build folder).
include(CMakePackageConfigHelpers)

# ---- Man pages and completions: made by the program from what its --help says --------------------------------------
set(USL_DOC ${CMAKE_BINARY_DIR}/doc)
file(GLOB_RECURSE USL_LUA_MODULES CONFIGURE_DEPENDS lua/unsloth/*.lua)
add_custom_command(OUTPUT ${USL_DOC}/stamp
  COMMAND unsloth-lua ${CMAKE_SOURCE_DIR}/lua/install/document.lua $<TARGET_FILE:unsloth-lua> ${CMAKE_SOURCE_DIR}/lua ${USL_DOC}
  COMMAND ${CMAKE_COMMAND} -E touch ${USL_DOC}/stamp
  DEPENDS unsloth-lua ${CMAKE_SOURCE_DIR}/lua/install/document.lua ${USL_LUA_MODULES}
  COMMENT "Man pages and completions" VERBATIM)
add_custom_target(usl_doc ALL DEPENDS ${USL_DOC}/stamp)

# ---- Files ---------------------------------------------------------------------------------------------------------
set(to_lib lib)
file(RELATIVE_PATH to_lib /x/${USL_CMOD} /x/${CMAKE_INSTALL_LIBDIR})
set_target_properties(unsloth PROPERTIES EXPORT_NAME unsloth)
set_target_properties(unsloth_static PROPERTIES EXPORT_NAME static)
set_target_properties(unsloth-lua-lib PROPERTIES EXPORT_NAME lua INSTALL_RPATH "$ORIGIN")
set_target_properties(unsloth_module PROPERTIES INSTALL_RPATH "$ORIGIN/${to_lib}")

install(TARGETS unsloth-lua)
install(TARGETS unsloth EXPORT unslothTargets INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS unsloth-lua-lib EXPORT unslothLuaTargets INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS unsloth_static EXPORT unslothStaticTargets INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(TARGETS unsloth_module LIBRARY DESTINATION ${USL_CMOD})
install(FILES core/unsloth.h lua/unsloth_lua.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY lua/unsloth lua/meta DESTINATION ${USL_MODULES}) # lua/meta: what help() says of functions in C
# The recipes, with what they use when no model is named, as they lie in the source.
install(DIRECTORY recipes DESTINATION ${USL_MODULES})
install(DIRECTORY examples/tiny-llama DESTINATION ${USL_MODULES}/examples)
install(FILES examples/instructions.json DESTINATION ${USL_MODULES}/examples)
install(DIRECTORY ${USL_DOC}/man/ DESTINATION ${CMAKE_INSTALL_MANDIR}/man1)
install(FILES ${USL_DOC}/unsloth-lua.bash DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions RENAME unsloth-lua)
install(FILES ${USL_DOC}/_unsloth-lua DESTINATION ${CMAKE_INSTALL_DATADIR}/zsh/site-functions)
install(FILES ${USL_DOC}/unsloth-lua.fish DESTINATION ${CMAKE_INSTALL_DATADIR}/fish/vendor_completions.d)
install(FILES README.md NOTICE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/unsloth-lua)
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/unsloth-lua RENAME copyright)

# ---- For those who link --------------------------------------------------------------------------------------------
# What the static library needs, by name, so that it is found on the machine that links.
set(USL_STATIC_LIBS)
foreach(lib ${USL_GEMM_LIBS} ${USL_CUDA_LIBS} pthread m dl)
  get_filename_component(name "${lib}" NAME)
  string(REGEX REPLACE "^lib(.*)\\.(so|a).*$" "\\1" name "${name}")
  list(APPEND USL_STATIC_LIBS -l${name})
endforeach()
string(REPLACE ";" " " USL_PC_LIBS "${USL_STATIC_LIBS}")

set(package ${CMAKE_INSTALL_LIBDIR}/cmake/unsloth)
foreach(part unslothTargets unslothLuaTargets unslothStaticTargets)
  install(EXPORT ${part} NAMESPACE unsloth:: DESTINATION ${package})
endforeach()
configure_package_config_file(lua/install/unslothConfig.cmake.in ${CMAKE_BINARY_DIR}/unslothConfig.cmake
                              INSTALL_DESTINATION ${package})
# Before 1.0 each minor version may change the interface.
write_basic_package_version_file(${CMAKE_BINARY_DIR}/unslothConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${CMAKE_BINARY_DIR}/unslothConfig.cmake ${CMAKE_BINARY_DIR}/unslothConfigVersion.cmake DESTINATION ${package})

# pkg-config finds the prefix from where its file lies, so that what is installed may be moved.
file(RELATIVE_PATH USL_PC_PREFIX /x/${CMAKE_INSTALL_LIBDIR}/pkgconfig /x)
string(REGEX REPLACE "/$" "" USL_PC_PREFIX "${USL_PC_PREFIX}")
foreach(name unsloth unsloth-lua)
  configure_file(lua/install/${name}.pc.in ${CMAKE_BINARY_DIR}/${name}.pc @ONLY)
  install(FILES ${CMAKE_BINARY_DIR}/${name}.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
endforeach()

# ---- The Debian package --------------------------------------------------------------------------------------------
set(CPACK_GENERATOR DEB)
set(CPACK_PACKAGE_NAME unsloth-lua)
set(CPACK_PACKAGE_CONTACT "The unsloth-lua authors <unsloth-lua@localhost>")
set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "fine-tunes large language models, scripted in Lua")
set(CPACK_PACKAGE_DESCRIPTION
    "A native program and C library that load, adapt, train, run and export large\nlanguage models; the program is a Lua 5.4 interpreter with the module built in.")
set(CPACK_PACKAGING_INSTALL_PREFIX /usr)
set(CPACK_STRIP_FILES ON)
set(CPACK_DEBIAN_FILE_NAME DEB-DEFAULT)
set(CPACK_DEBIAN_PACKAGE_SECTION science)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS ON)
set(CPACK_DEBIAN_PACKAGE_SHLIBDEPS_PRIVATE_DIRS ${CMAKE_BINARY_DIR})
set(CPACK_DEBIAN_PACKAGE_SUGGESTS "lua5.4")
set(CPACK_THREADS 0)
include(CPack)
