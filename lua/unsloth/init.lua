--- unsloth: fine-tune large language models from Lua.
local core = require "unsloth.core"

local M = { _VERSION = core.version }

M.tensor = core.tensor
M.quant = { quantize = core.quantize, dequantize = core.dequantize }

return M
