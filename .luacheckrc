std = "lua54"
max_line_length = 140
exclude_files = { "build*", "outputs" }
files["tests/**/*_spec.lua"] = { std = "lua54+busted" }
