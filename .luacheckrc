std = "lua54"
max_line_length = 160
-- "not (x <= y)" is how a NaN is caught.
ignore = { "581" }
files["lua/meta"] = { ignore = { "212", "241", "631" } } -- made by a script
exclude_files = { "build*", "outputs" }
files["tests/**/*_spec.lua"] = { std = "lua54+busted" }
files["examples/embed/*.lua"] = { read_globals = { "unsloth", "host_row", "host_reward" } } -- what the host gives
