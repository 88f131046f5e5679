---@meta unsloth.core

-- The functions that are C: for the editor's language server, for help() and for the reference. Nothing here is run.

local core = {}

---@type string
core.version = ""

-- ---- Tensors --------------------------------------------------------------------------------------------------------

--- Numbers with a shape. Positions and dimensions count from 1; t[i] is a row or a number, t[{ 2, { 1, 3 } }] a slice; + - * / ^
--- work element by element and repeat dimensions of length 1. Tensors are never changed in place.
---@class unsloth.Tensor
---@field shape integer[] the lengths of its dimensions
---@field dtype string "float32", "int64", ...
---@field ndim integer
---@field device string where its numbers are
---@operator add(unsloth.Tensor|number): unsloth.Tensor
---@operator sub(unsloth.Tensor|number): unsloth.Tensor
---@operator mul(unsloth.Tensor|number): unsloth.Tensor
---@operator div(unsloth.Tensor|number): unsloth.Tensor
---@operator pow(unsloth.Tensor|number): unsloth.Tensor
---@operator unm: unsloth.Tensor
---@operator len: integer
local Tensor = {}
core.Tensor = Tensor

--- A tensor of a number or of nested arrays, which must be of one length each.
---
---     print(unsloth.tensor({ { 1, 2 }, { 3, 4 } }))
---@param values number|table
---@param dtype string|nil default "float32"
---@return unsloth.Tensor
function core.tensor(values, dtype) end

--- A text of strangers as a terminal may show it: controls, which would steer it, are written out.
---
---     print(unsloth.printable "red: \27[31m")
---@param text string
---@param one_line boolean|nil also the line's end and the tab
---@return string
function core.printable(text, one_line) end

--- Bytes of a quantised type, as ggml lays them out.
---
---     print(#unsloth.quant.quantize(unsloth.ones(256), "q4_k"))
---@param tensor unsloth.Tensor its length is a multiple of the type's block
---@param dtype string ggml's name in lower case, or "nf4"
---@return string
function core.quantize(tensor, dtype) end

--- The n values of a quantised string.
---
---     print(unsloth.quant.dequantize(unsloth.quant.quantize(unsloth.ones(32), "q8_0"), "q8_0", 32):mean())
---@param bytes string
---@param dtype string
---@param n integer
---@return unsloth.Tensor
function core.dequantize(bytes, dtype, n) end

--- The tensors of a .safetensors file by name.
---
---     unsloth.safetensors.save("numbers.safetensors", { a = unsloth.ones(2) })
---     print(unsloth.safetensors.load("numbers.safetensors").a)
---@param path string
---@return table<string, unsloth.Tensor>
function core.safetensors_load(path) end

--- Writes tensors by name into a .safetensors file.
---
---     unsloth.safetensors.save("numbers.safetensors", { a = unsloth.ones(2) })
---@param path string
---@param tensors table<string, unsloth.Tensor>
---@param metadata table<string, string>|nil
function core.safetensors_save(path, tensors, metadata) end

--- Its numbers as nested arrays.
---
---     print(#unsloth.ones(2, 3):totable())
---@return table|number
function Tensor:totable() end

--- The number of a tensor that holds one.
---
---     print(unsloth.tensor(7):item())
---@return number
function Tensor:item() end

--- The part at a position along the first dimension; a view.
---
---     print(unsloth.eye(3):select(2))
---@param position integer from 1
---@return unsloth.Tensor
function Tensor:select(position) end

--- So many positions along a dimension; a view.
---
---     print(unsloth.eye(4):narrow(1, 2, 2))
---@param dim integer
---@param start integer from 1
---@param length integer
---@return unsloth.Tensor
function Tensor:narrow(dim, start, length) end

--- A dense copy of another type.
---
---     print(unsloth.ones(2):to("bfloat16").dtype)
---@param dtype string|nil nil: its own
---@return unsloth.Tensor
function Tensor:to(dtype) end

--- The position of the largest value of each row, from 0: a token's id. An array when there are several rows.
---
---     print(unsloth.tensor({ 1, 7, 3 }):argmax_id())
---@return integer|integer[]
function Tensor:argmax_id() end

--- How far it is from a reference: the relative error, the norm of the difference, the norm of the reference.
---
---     print(unsloth.ones(3):distance(unsloth.ones(3) * 1.1))
---@param reference unsloth.Tensor
---@return number relative
---@return number difference
---@return number reference
function Tensor:distance(reference) end

--- The matrix product. A vector counts as a row at the left and as a column at the right; tensors of more dimensions are batches.
---
---     print(unsloth.ones(2, 3):matmul(unsloth.ones(3, 4)))
---@param other unsloth.Tensor
---@return unsloth.Tensor
function Tensor:matmul(other) end

--- Element by element: -x.
---
---     print(unsloth.tensor({ 0.5, 1 }):neg())
---@return unsloth.Tensor
function Tensor:neg() end

--- Element by element: |x|.
---
---     print(unsloth.tensor({ 0.5, 1 }):abs())
---@return unsloth.Tensor
function Tensor:abs() end

--- Element by element: e^x.
---
---     print(unsloth.tensor({ 0.5, 1 }):exp())
---@return unsloth.Tensor
function Tensor:exp() end

--- Element by element: the natural logarithm of x.
---
---     print(unsloth.tensor({ 0.5, 1 }):log())
---@return unsloth.Tensor
function Tensor:log() end

--- Element by element: the square root of x.
---
---     print(unsloth.tensor({ 0.5, 1 }):sqrt())
---@return unsloth.Tensor
function Tensor:sqrt() end

--- Element by element: 1 / sqrt(x).
---
---     print(unsloth.tensor({ 0.5, 1 }):rsqrt())
---@return unsloth.Tensor
function Tensor:rsqrt() end

--- Element by element: x * x.
---
---     print(unsloth.tensor({ 0.5, 1 }):square())
---@return unsloth.Tensor
function Tensor:square() end

--- Element by element: the sine of x.
---
---     print(unsloth.tensor({ 0.5, 1 }):sin())
---@return unsloth.Tensor
function Tensor:sin() end

--- Element by element: the cosine of x.
---
---     print(unsloth.tensor({ 0.5, 1 }):cos())
---@return unsloth.Tensor
function Tensor:cos() end

--- Element by element: the hyperbolic tangent of x.
---
---     print(unsloth.tensor({ 0.5, 1 }):tanh())
---@return unsloth.Tensor
function Tensor:tanh() end

--- Element by element: the error function of x.
---
---     print(unsloth.tensor({ 0.5, 1 }):erf())
---@return unsloth.Tensor
function Tensor:erf() end

--- Element by element: 1 / (1 + e^-x).
---
---     print(unsloth.tensor({ 0.5, 1 }):sigmoid())
---@return unsloth.Tensor
function Tensor:sigmoid() end

--- Element by element: x where it is above 0, else 0.
---
---     print(unsloth.tensor({ 0.5, 1 }):relu())
---@return unsloth.Tensor
function Tensor:relu() end

--- Element by element: x * sigmoid(x).
---
---     print(unsloth.tensor({ 0.5, 1 }):silu())
---@return unsloth.Tensor
function Tensor:silu() end

--- Element by element: x times the normal distribution's share below x.
---
---     print(unsloth.tensor({ 0.5, 1 }):gelu())
---@return unsloth.Tensor
function Tensor:gelu() end

--- Element by element: the nearest whole number, the even one of two.
---
---     print(unsloth.tensor({ 0.5, 1 }):round())
---@return unsloth.Tensor
function Tensor:round() end

--- Element by element: the largest whole number not above x.
---
---     print(unsloth.tensor({ 0.5, 1 }):floor())
---@return unsloth.Tensor
function Tensor:floor() end

--- Element by element: the smallest whole number not below x.
---
---     print(unsloth.tensor({ 0.5, 1 }):ceil())
---@return unsloth.Tensor
function Tensor:ceil() end

--- Element by element: the sum; dimensions of length 1 are repeated.
---
---     print(unsloth.tensor({ 1, 2 }):add(unsloth.tensor({ 2, 2 })))
---@param other unsloth.Tensor|number
---@return unsloth.Tensor
function Tensor:add(other) end

--- Element by element: the difference; dimensions of length 1 are repeated.
---
---     print(unsloth.tensor({ 1, 2 }):sub(unsloth.tensor({ 2, 2 })))
---@param other unsloth.Tensor|number
---@return unsloth.Tensor
function Tensor:sub(other) end

--- Element by element: the product; dimensions of length 1 are repeated.
---
---     print(unsloth.tensor({ 1, 2 }):mul(unsloth.tensor({ 2, 2 })))
---@param other unsloth.Tensor|number
---@return unsloth.Tensor
function Tensor:mul(other) end

--- Element by element: the quotient; dimensions of length 1 are repeated.
---
---     print(unsloth.tensor({ 1, 2 }):div(unsloth.tensor({ 2, 2 })))
---@param other unsloth.Tensor|number
---@return unsloth.Tensor
function Tensor:div(other) end

--- Element by element: the power; dimensions of length 1 are repeated.
---
---     print(unsloth.tensor({ 1, 2 }):pow(unsloth.tensor({ 2, 2 })))
---@param other unsloth.Tensor|number
---@return unsloth.Tensor
function Tensor:pow(other) end

--- Element by element: the larger of both; dimensions of length 1 are repeated.
---
---     print(unsloth.tensor({ 1, 2 }):maximum(unsloth.tensor({ 2, 2 })))
---@param other unsloth.Tensor|number
---@return unsloth.Tensor
function Tensor:maximum(other) end

--- Element by element: the smaller of both; dimensions of length 1 are repeated.
---
---     print(unsloth.tensor({ 1, 2 }):minimum(unsloth.tensor({ 2, 2 })))
---@param other unsloth.Tensor|number
---@return unsloth.Tensor
function Tensor:minimum(other) end

--- Element by element: 1 where both are equal, else 0; dimensions of length 1 are repeated.
---
---     print(unsloth.tensor({ 1, 2 }):eq(unsloth.tensor({ 2, 2 })))
---@param other unsloth.Tensor|number
---@return unsloth.Tensor
function Tensor:eq(other) end

--- Element by element: 1 where it is below the other, else 0; dimensions of length 1 are repeated.
---
---     print(unsloth.tensor({ 1, 2 }):lt(unsloth.tensor({ 2, 2 })))
---@param other unsloth.Tensor|number
---@return unsloth.Tensor
function Tensor:lt(other) end

--- Element by element: 1 where it is not above the other, else 0; dimensions of length 1 are repeated.
---
---     print(unsloth.tensor({ 1, 2 }):le(unsloth.tensor({ 2, 2 })))
---@param other unsloth.Tensor|number
---@return unsloth.Tensor
function Tensor:le(other) end

--- Element by element: 1 where it is above the other, else 0; dimensions of length 1 are repeated.
---
---     print(unsloth.tensor({ 1, 2 }):gt(unsloth.tensor({ 2, 2 })))
---@param other unsloth.Tensor|number
---@return unsloth.Tensor
function Tensor:gt(other) end

--- Element by element: 1 where it is not below the other, else 0; dimensions of length 1 are repeated.
---
---     print(unsloth.tensor({ 1, 2 }):ge(unsloth.tensor({ 2, 2 })))
---@param other unsloth.Tensor|number
---@return unsloth.Tensor
function Tensor:ge(other) end

--- The sum of all values, or along a dimension.
---
---     print(unsloth.tensor({ { 1, 2 }, { 3, 5 } }):sum(), unsloth.tensor({ { 1, 2 }, { 3, 5 } }):sum(1))
---@param dim integer|nil nil: all of the tensor, a number; negative counts from the end
---@param keepdim boolean|nil the dimension stays, of length 1
---@return number|unsloth.Tensor
function Tensor:sum(dim, keepdim) end

--- The product of all values, or along a dimension.
---
---     print(unsloth.tensor({ { 1, 2 }, { 3, 5 } }):prod(), unsloth.tensor({ { 1, 2 }, { 3, 5 } }):prod(1))
---@param dim integer|nil nil: all of the tensor, a number; negative counts from the end
---@param keepdim boolean|nil the dimension stays, of length 1
---@return number|unsloth.Tensor
function Tensor:prod(dim, keepdim) end

--- The mean of all values, or along a dimension.
---
---     print(unsloth.tensor({ { 1, 2 }, { 3, 5 } }):mean(), unsloth.tensor({ { 1, 2 }, { 3, 5 } }):mean(1))
---@param dim integer|nil nil: all of the tensor, a number; negative counts from the end
---@param keepdim boolean|nil the dimension stays, of length 1
---@return number|unsloth.Tensor
function Tensor:mean(dim, keepdim) end

--- The variance of a sample (by n - 1) of all values, or along a dimension.
---
---     print(unsloth.tensor({ { 1, 2 }, { 3, 5 } }):var(), unsloth.tensor({ { 1, 2 }, { 3, 5 } }):var(1))
---@param dim integer|nil nil: all of the tensor, a number; negative counts from the end
---@param keepdim boolean|nil the dimension stays, of length 1
---@return number|unsloth.Tensor
function Tensor:var(dim, keepdim) end

--- The standard deviation of a sample of all values, or along a dimension.
---
---     print(unsloth.tensor({ { 1, 2 }, { 3, 5 } }):std(), unsloth.tensor({ { 1, 2 }, { 3, 5 } }):std(1))
---@param dim integer|nil nil: all of the tensor, a number; negative counts from the end
---@param keepdim boolean|nil the dimension stays, of length 1
---@return number|unsloth.Tensor
function Tensor:std(dim, keepdim) end

--- The root of the sum of squares of all values, or along a dimension.
---
---     print(unsloth.tensor({ { 1, 2 }, { 3, 5 } }):norm(), unsloth.tensor({ { 1, 2 }, { 3, 5 } }):norm(1))
---@param dim integer|nil nil: all of the tensor, a number; negative counts from the end
---@param keepdim boolean|nil the dimension stays, of length 1
---@return number|unsloth.Tensor
function Tensor:norm(dim, keepdim) end

--- The largest value of all values, or along a dimension.
---
---     print(unsloth.tensor({ { 1, 2 }, { 3, 5 } }):max(), unsloth.tensor({ { 1, 2 }, { 3, 5 } }):max(1))
---@param dim integer|nil nil: all of the tensor, a number; negative counts from the end
---@param keepdim boolean|nil the dimension stays, of length 1
---@return number|unsloth.Tensor
function Tensor:max(dim, keepdim) end

--- The smallest value of all values, or along a dimension.
---
---     print(unsloth.tensor({ { 1, 2 }, { 3, 5 } }):min(), unsloth.tensor({ { 1, 2 }, { 3, 5 } }):min(1))
---@param dim integer|nil nil: all of the tensor, a number; negative counts from the end
---@param keepdim boolean|nil the dimension stays, of length 1
---@return number|unsloth.Tensor
function Tensor:min(dim, keepdim) end

--- The position of the largest value, from 1 (argmax_id counts from 0) of all values, or along a dimension.
---
---     print(unsloth.tensor({ { 1, 2 }, { 3, 5 } }):argmax(), unsloth.tensor({ { 1, 2 }, { 3, 5 } }):argmax(1))
---@param dim integer|nil nil: all of the tensor, a number; negative counts from the end
---@param keepdim boolean|nil the dimension stays, of length 1
---@return number|unsloth.Tensor
function Tensor:argmax(dim, keepdim) end

--- The position of the smallest value, from 1 of all values, or along a dimension.
---
---     print(unsloth.tensor({ { 1, 2 }, { 3, 5 } }):argmin(), unsloth.tensor({ { 1, 2 }, { 3, 5 } }):argmin(1))
---@param dim integer|nil nil: all of the tensor, a number; negative counts from the end
---@param keepdim boolean|nil the dimension stays, of length 1
---@return number|unsloth.Tensor
function Tensor:argmin(dim, keepdim) end

--- Shares that sum to 1 along a dimension.
---
---     print(unsloth.tensor({ 1, 2, 3 }):softmax())
---@param dim integer|nil default: the last
---@return unsloth.Tensor
function Tensor:softmax(dim) end

--- The logarithms of softmax.
---
---     print(unsloth.tensor({ 1, 2, 3 }):log_softmax())
---@param dim integer|nil default: the last
---@return unsloth.Tensor
function Tensor:log_softmax(dim) end

--- Frees its memory now; the collector would do it later.
---
---     t:close()
function Tensor:close() end

-- ---- JSON -----------------------------------------------------------------------------------------------------------

core.json = {}

--- JSON's null inside objects and arrays.
core.json.null = nil

--- The value of a JSON text. Objects keep the order of their keys, arrays stay arrays.
---
---     print(unsloth.json.decode('{ "a": [1, 2] }').a[2])
---@param text string
---@param name string|nil what errors call it
---@return any
function core.json.decode(text, name) end

--- The JSON text of a value.
---
---     print(unsloth.json.encode { b = 1, list = { 1, 2 } })
---@param value any
---@return string
function core.json.encode(value) end

--- Marks a table as an array, also an empty one. Returns it.
---
---     print(unsloth.json.encode { rows = unsloth.json.array {} })
---@param list table
---@return table
function core.json.array(list) end

--- Marks a table as an object, also an empty one. Returns it.
---
---     print(unsloth.json.encode(unsloth.json.object {}))
---@param fields table
---@return table
function core.json.object(fields) end

--- Whether a value would be written as an array.
---
---     print(unsloth.json.is_array { 1, 2 })
---@param value any
---@return boolean
function core.json.is_array(value) end

-- ---- Tokenizers -----------------------------------------------------------------------------------------------------

--- Text to ids and back; #tokenizer is the number of its tokens.
---@class unsloth.Tokenizer
---@field bos_token string|nil
---@field bos_token_id integer|nil
---@field eos_token string|nil
---@field eos_token_id integer|nil
---@field pad_token string|nil
---@field pad_token_id integer|nil
---@field unk_token string|nil
---@field unk_token_id integer|nil
---@field chat_template string|nil
---@operator len: integer
local Tokenizer = {}
core.Tokenizer = Tokenizer

--- The ids of a text; spellings of special tokens become their ids.
---
---     print(table.concat(tokenizer:encode("Hello"), " "))
---@param text string
---@param opts { add_special_tokens: boolean }|nil default true: what the tokenizer puts around a text
---@return integer[]
function Tokenizer:encode(text, opts) end

--- The ids of many texts, made on all threads: an array of arrays, each as encode gives it.
---
---     print(#tokenizer:encode_batch { "Hello", "Hello again" })
---@param texts string[]
---@param opts { add_special_tokens: boolean }|nil default true
---@return integer[][]
function Tokenizer:encode_batch(texts, opts) end

--- The text of ids.
---
---     print(tokenizer:decode(tokenizer:encode("Hello"), { skip_special_tokens = true }))
---@param ids integer[]
---@param opts { skip_special_tokens: boolean }|nil default false
---@return string
function Tokenizer:decode(ids, opts) end

--- The id of one token's exact spelling, nil when there is none.
---
---     print(tokenizer:token_to_id(tokenizer.eos_token))
---@param token string
---@return integer|nil
function Tokenizer:token_to_id(token) end

--- The spelling of an id, nil when it is out of range.
---
---     print(tokenizer:id_to_token(0))
---@param id integer
---@return string|nil
function Tokenizer:id_to_token(id) end

--- Ids to text as they come, in whole characters: an object with push(id) and finish(), which give pieces.
---
---     print(tokenizer:text_stream({}, true):push(5))
---@param before integer[]|nil the ids in front
---@param skip_special_tokens boolean|nil
---@return userdata
function Tokenizer:text_stream(before, skip_special_tokens) end

--- Sets the chat template, which goes with what is saved; get_chat_template does more.
---
---     tokenizer:set_chat_template "{{ messages[0].content }}"
---@param template string Jinja
function Tokenizer:set_chat_template(template) end

--- Makes an id the "bos", "eos", "pad" or "unk" token.
---
---     tokenizer:set_special("pad", tokenizer.eos_token_id)
---@param which string
---@param id integer|nil nil: there is none
function Tokenizer:set_special(which, id) end

--- Gives a token another spelling, which no other token may have.
---
---     tokenizer:rename(5, "<|mine|>")
---@param id integer
---@param token string
function Tokenizer:rename(id, token) end

--- Adds tokens: what add_tokens is made of.
---
---     print(tokenizer:extend({ "<|one|>" }, true))
---@param tokens string[]
---@param special boolean|nil
---@return integer how many are new
function Tokenizer:extend(tokens, special) end

--- Renders a chat template over JSON texts: what apply_chat_template is made of.
---
---     print(tokenizer:render_chat(unsloth.json.encode { { role = "user", content = "Hi" } }))
---@param messages string a JSON array
---@param opts table|nil
---@return string text
---@return table|nil spans of what the assistant says
function Tokenizer:render_chat(messages, opts) end

--- Writes tokenizer.json and tokenizer_config.json into a folder.
---
---     tokenizer:save_pretrained "outputs/tokenizer"
---@param dir string
function Tokenizer:save_pretrained(dir) end

--- Frees its memory now; the collector would do it later.
---
---     tokenizer:close()
function Tokenizer:close() end

-- ---- Data sets ------------------------------------------------------------------------------------------------------

--- Rows of a data set; ds[i] is a table, #ds their number.
---@class unsloth.Dataset
---@operator len: integer
local Dataset = {}
core.Dataset = Dataset

--- Adds a row to a data set that dataset_from_list has made.
---
---     unsloth.dataset_from_list({}):append { text = "a row" }
---@param row table|string a table, or the text of a JSON object
function Dataset:append(row) end

--- "FILE: line 12" or "row 3": where a row came from, for messages.
---
---     print(ds:where(1))
---@param position integer
---@return string|nil
function Dataset:where(position) end

--- The rows with these numbers: what select is made of.
---
---     print(#ds:pick { 1, 3 })
---@param positions integer[]
---@return unsloth.Dataset
function Dataset:pick(positions) end

--- The rows in the order that a seed gives: what shuffle is made of.
---
---     print(ds:permute(3407)[1])
---@param seed integer
---@return unsloth.Dataset
function Dataset:permute(seed) end

--- alpaca, ShareGPT, OpenAI, DPO and KTO rows to `messages`: what standardize_data_formats is made of.
---
---     print(ds:standardize()[1].messages[1].content)
---@return unsloth.Dataset
function Dataset:standardize() end

--- Frees its memory now; the collector would do it later.
---
---     ds:close()
function Dataset:close() end

--- Tokenised rows, as a trainer takes them.
---@class unsloth.Rows
---@operator len: integer
local Rows = {}
core.Rows = Rows

--- Adds a row of ids; labels of -100 do not count, without labels all ids do.
---
---     rows:add({ 1, 5, 7 }, { -100, 5, 7 })
---@param ids integer[]
---@param labels integer[]|nil
function Rows:add(ids, labels) end

--- Counts: rows, tokens, counted labels, longest, truncated, dropped.
---
---     print(trainer.rows:stats().tokens)
---@return table<string, integer>
function Rows:stats() end

--- The ids and labels of a row.
---
---     print(#trainer.rows:get(1))
---@param position integer
---@return integer[] ids
---@return integer[] labels
function Rows:get(position) end

--- New rows whose labels count only behind a response marker: what train_on_responses_only is made of.
---
---     local masked = rows:mask_responses(tokenizer:encode "Q:", tokenizer:encode "A:")
---@param instruction integer[]
---@param response integer[]
---@param last_only boolean|nil
---@return unsloth.Rows
function Rows:mask_responses(instruction, response, last_only) end

--- Frees its memory now; the collector would do it later.
---
---     rows:close()
function Rows:close() end

-- ---- Models ---------------------------------------------------------------------------------------------------------

--- A model: weights, named adapters, and the device they are on.
---@class unsloth.Model
---@field tokenizer unsloth.Tokenizer|nil
---@field max_seq_length integer
---@field device string
---@field dtype string
---@field name_or_path string
local Model = {}
core.Model = Model

--- Sizes and counts: architecture, device, dtype, layers, hidden, vocab, parameters, trainable, weight_bytes, ...
---
---     print(model:info().parameters)
---@return table
function Model:info() end

--- Adds an adapter: what get_peft_model is made of.
---
---     model:add_lora { rank = 8, alpha = 8 }
---@param opts table
function Model:add_lora(opts) end

--- Makes an adapter active, or none: what set_adapter and disable_adapter are made of.
---
---     model:activate(nil)
---@param name string|nil
function Model:activate(name) end

--- The active adapter's name, nil when there is none.
---
---     print(model:active_adapter())
---@return string|nil
function Model:active_adapter() end

--- Writes the active adapter as a PEFT folder: what save_pretrained is made of.
---
---     model:save_adapter "outputs/adapter"
---@param dir string
---@param base string|nil
---@param as_lora boolean|nil what PiSSA made becomes plain LoRA of twice the rank
function Model:save_adapter(dir, base, as_lora) end

--- The names of all parameters, and for each whether it is trained.
---
---     print(#(model:params()))
---@return string[] names
---@return table<string, boolean> trained
function Model:params() end

--- All parameters as they are held: { name, shape, dtype, bytes, trainable }.
---
---     print(model:param_list()[1].name)
---@return table[]
function Model:param_list() end

--- A parameter by its published name, decoded to float32.
---
---     print(model:get_param("model.norm.weight"))
---@param name string
---@return unsloth.Tensor
function Model:get_param(name) end

--- Gives a trained parameter other numbers.
---
---     model:set_param(name, model:get_param(name) * 0)
---@param name string
---@param value unsloth.Tensor
function Model:set_param(name, value) end

--- Gives the embeddings and the head rows for another number of tokens: what resize_token_embeddings is made of.
---
---     model:resize_vocab(model:info().vocab + 8)
---@param rows integer
---@param mean_of integer|nil new rows are the mean of so many of the first; nil: of all
function Model:resize_vocab(rows, mean_of) end

--- Moves a token's rows towards the mean of other tokens' by a weight from 0 to 1; of a model whose vocabulary was resized.
---
---     model:resize_vocab(model:info().vocab + 1)
---     model:blend_row(model:info().vocab - 1, { 5, 6 }, 0.5)
---@param id integer
---@param ids integer[]
---@param weight number
function Model:blend_row(id, ids, weight) end

--- The logits of a row of ids: a tensor of (tokens, vocabulary).
---
---     print(model:logits(tokenizer:encode("Hello")).shape[2])
---@param ids integer[]
---@return unsloth.Tensor
function Model:logits(ids) end

--- The final norm and the head for hidden states of any layer: (rows, hidden) to (rows, vocabulary).
---
---     print(model:unembed(model:hidden_states("Hello")[1]).shape[2])
---@param states unsloth.Tensor
---@return unsloth.Tensor
function Model:unembed(states) end

--- An object whose next() gives ids: what stream is made of.
---
---     local generator = model:generator(tokenizer:encode("Once"), { max_new_tokens = 8 })
---@param ids integer[]
---@param opts table|nil
---@return unsloth.Generator
function Model:generator(ids, opts) end

--- Frees the model now; the collector would do it later.
---
---     model:close()
function Model:close() end

--- Ids as they come.
---@class unsloth.Generator
local Generator = {}
core.Generator = Generator

--- The next id, nil at the end.
---
---     for id in generator.next, generator do print(id) end
---@return integer|nil
function Generator:next() end

--- Frees its memory now; leaving a loop over model:stream does it too.
---
---     generator:close()
function Generator:close() end

return core
