-- json, tensors, safetensors files, quantised strings.
local support = assert(loadfile((debug.getinfo(1, "S").source:match "^@(.*/)" or "./") .. "support.lua", "t", _ENV))()
local unsloth = require "unsloth"

local json, quant, tensor = unsloth.json, unsloth.quant, unsloth.tensor

describe("json", function()
  it("gives back byte for byte what it read", function()
    for _, text in ipairs { '{"z":1,"a":[],"m":{},"b":[1,2.0,"x",null,true,false]}', "[]", "{}", "null", "1.0", "1", "-0.5", '""',
      '[[[]],{"k":{"z":null,"y":[{}]}}]', '"\\u0000"', '{"":1}' } do
      assert.equals(text, json.encode(json.decode(text)))
    end
  end)

  it("keeps the order of keys and answers like a plain table", function()
    local object = json.decode '{"zebra":1,"apple":2,"mango":3}'
    local keys = {}
    for key in pairs(object) do keys[#keys + 1] = key end
    assert.same({ "zebra", "apple", "mango" }, keys)
    assert.equals(2, object.apple)
    assert.equals(3, #json.decode "[1,2,3]")
    object.new, object.zebra = 4, nil
    assert.equals('{"apple":2,"mango":3,"new":4}', json.encode(object))
  end)

  it("tells integers from floats and null from nothing", function()
    local list = json.decode "[1, 1.0, 1e2, 9007199254740993, null]"
    assert.equals("integer", math.type(list[1]))
    assert.equals("float", math.type(list[2]))
    assert.equals("float", math.type(list[3]))
    assert.equals(9007199254740993, list[4])
    assert.equals(json.null, list[5])
    assert.equals(5, #list)
  end)

  it("reads escapes into UTF-8", function()
    assert.equals("\u{1F600}", json.decode '"\\ud83d\\ude00"')
    assert.equals("a\0b", json.decode '"a\\u0000b"')
    assert.equals("\u{E9}\n\t\"\\/", json.decode '"\\u00e9\\n\\t\\"\\\\\\/"')
    local ok, lone = pcall(json.decode, '"\\ud800"')
    assert.is_true(not ok or lone == "\u{FFFD}")
  end)

  it("refuses what is no JSON, with a sentence", function()
    for _, text in ipairs { "", " ", "{", "[1,]", '{"a":}', "{'a':1}", "NaN", "01", '"\1"', '"\xff"', "[1] 2", "tru", '{"a" 1}' } do
      support.fails("USL_ERR_FORMAT", {}, json.decode, text)
    end
    support.fails(nil, {}, json.decode, ("["):rep(100000))
    support.fails(nil, {}, json.encode, { print })
    local loop = {}
    loop[1] = loop
    support.fails(nil, {}, json.encode, loop)
  end)
end)

describe("tensors", function()
  it("are float32, counted from 1, nested by dimension", function()
    local t = tensor { { 1, 2, 3 }, { 4, 5, 6 } }
    assert.same({ 2, 3 }, t.shape)
    assert.equals("float32", t.dtype)
    assert.equals(6.0, t[2][3])
    assert.is_nil(t[3])
    assert.same({ { 1.0, 2.0, 3.0 }, { 4.0, 5.0, 6.0 } }, t:totable())
    assert.same({ 1.5, 2.5 }, tensor({ 1.5, 2.5 }):totable())
    assert.same({ 2, 2 }, t:narrow(2, 2, 2).shape)
    for _, i in ipairs { 0, -1, math.mininteger, math.maxinteger } do support.fails("USL_ERR_INVALID", tostring(i), t.select, t, i) end
    assert.same({ { { 1.0 } }, { { 2.0 } } }, tensor({ { { 1 } }, { { 2 } } }):totable())
  end)

  it("give ids, counted from 0", function()
    assert.equals(1, tensor({ 1, 7, 3 }):argmax_id())
    assert.same({ 2, 0 }, tensor({ { 1, 2, 3 }, { 6, 5, 4 } }):argmax_id())
  end)

  it("print", function()
    local text = tostring(tensor { { 1, 2 }, { 3, 4 } })
    assert.is_truthy(text:find("2x2", 1, true))
    assert.is_truthy(text:find("4", 1, true))
  end)

  it("refuse what is ragged, no number, or written to", function()
    support.fails("USL_ERR_SHAPE", "length", tensor, { { 1, 2 }, { 3 } })
    support.fails("USL_ERR_INVALID", "numbers", tensor, { "x" })
    local t = tensor { 1 }
    support.fails("USL_ERR_INVALID", "read-only", function() t[1] = 2 end)
  end)

  it("go to a file and back", function()
    local dir = support.temp_dir()
    finally(function() support.remove(dir) end)
    local path = dir .. "/t.safetensors"
    local given = { ["b.weight"] = tensor { { 1.25, -2 }, { 3, 1e-3 } }, a = tensor { 7 } }
    unsloth.safetensors.save(path, given)
    local read = unsloth.safetensors.load(path)
    assert.same(given["b.weight"]:totable(), read["b.weight"]:totable())
    assert.same({ 7.0 }, read.a:totable())
    local bytes = support.read(path)
    unsloth.safetensors.save(path, read)
    assert.equals(bytes, support.read(path))
    support.write(path, bytes:sub(1, -2))
    support.fails("USL_ERR_FORMAT", path, unsloth.safetensors.load, path)
    support.fails("USL_ERR_NOT_FOUND", "/no/such", unsloth.safetensors.load, "/no/such/file.safetensors")
  end)
end)

-- Bytes for 256 values, as ggml lays them out; NF4 has one float32 constant for 64 values.
local BYTES = { f32 = 1024, f16 = 512, bf16 = 512, q4_0 = 144, q4_1 = 160, q5_0 = 176, q5_1 = 192, q8_0 = 272, q2_k = 84, q3_k = 110,
  q4_k = 144, q5_k = 176, q6_k = 210, iq4_nl = 144, iq4_xs = 136, mxfp4 = 136 }
-- Not more than ggml's own error on such values, with a fifth to spare.
local ERROR = { f32 = 0, f16 = 5e-4, bf16 = 4e-3, q4_0 = 0.11, q4_1 = 0.10, q5_0 = 0.055, q5_1 = 0.05, q8_0 = 0.01, q2_k = 0.36, q3_k = 0.2,
  q4_k = 0.1, q5_k = 0.05, q6_k = 0.025, nf4 = 0.11 }

describe("quantised strings", function()
  local values = {}
  for i = 1, 1024 do values[i] = math.sin(i * 0.37) * math.cos(i * i * 0.011) * 0.05 end
  local source = tensor(values)

  for name, bound in pairs(ERROR) do
    it("of " .. name .. " come back near", function()
      local bytes = quant.quantize(source, name)
      if BYTES[name] then assert.equals(4 * BYTES[name], #bytes) end
      local back = quant.dequantize(bytes, name, 1024)
      assert.same({ 1024 }, back.shape)
      assert.equals("float32", back.dtype)
      local distance = back:distance(source)
      assert.is_true(distance <= bound, ("%s: %g"):format(name, distance))
    end)
  end

  -- A value in the middle between two levels belongs to the lower one, as in bitsandbytes.
  it("of nf4 are bitsandbytes' codes, also of a short last block", function()
    local levels = { -1, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0, 0.0795803, 0.1609302, 0.2461123,
      0.33791524, 0.44070983, 0.562617, 0.72295684, 1 }
    local bytes = quant.quantize(tensor(table.move(levels, 1, 15, 1, { })), "nf4")
    assert.equals(8 + 4, #bytes)
    assert.equals("\x01\x23\x45\x67\x89\xAB\xCD\xE7", bytes:sub(1, 8)) -- an odd count is filled with the code of zero
    local back = quant.dequantize(bytes, "nf4", 15):totable()
    for i = 1, 15 do assert.is_true(math.abs(back[i] - levels[i]) < 1e-7) end
  end)

  it("refuse unknown types and wrong lengths", function()
    support.fails(nil, "q9_z", quant.quantize, source, "q9_z")
    support.fails(nil, {}, quant.quantize, tensor { 1, 2, 3 }, "q4_0")
    support.fails("USL_ERR_SHAPE", "1024", quant.dequantize, "short", "q4_0", 1024)
    support.fails("USL_ERR_SHAPE", {}, quant.dequantize, "short", "q4_0", -32)
    support.fails("USL_ERR_SHAPE", {}, quant.dequantize, "", "q4_0", math.maxinteger)
  end)

  support.it_with("data/gguf/quant_blocks", "decode to what ggml decodes", function(dir)
    for name, bytes_of_256 in pairs(BYTES) do
      local path = ("%s/%s.quant"):format(dir, name:upper())
      local file = io.open(path, "rb")
      if file then
        file:close()
        local bytes, wanted = support.read(path), support.read(path:gsub("quant$", "deq.f32"))
        local n = #wanted // 4
        assert.equals(n // 256 * bytes_of_256, #bytes, name)
        local ours = quant.dequantize(bytes, name, n):totable()
        for i = 1, n do
          local value = string.unpack("<f", wanted, 4 * i - 3)
          -- One rounding of float32.
          assert(math.abs(ours[i] - value) <= math.abs(value) * 2 ^ -23, ("%s: value %d is %g, ggml says %g"):format(name, i, ours[i], value))
        end
      end
    end
  end)
end)
