#!/usr/bin/env python3
"""Compares the templates that core/text renders with those that transformers renders.

    test_chat_torch.py [--program build/unsloth-lua] [--shared ../shared] [--unsloth DIR] [--rounds N]

Published templates and their cases lie in --shared; messages made at random go through the same templates and through
the named ones. With --unsloth (the folder of an installed unsloth package) each named template of ours must write what
the one of that name writes there. Needs transformers (and with it jinja2)."""
import argparse
import ast
import gzip
import json
import pathlib
import random
import subprocess
import sys
import tempfile

from transformers.utils.chat_template_utils import render_jinja_template

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
RENDER = """
local unsloth = require "unsloth"
local jobs, out = arg[1], assert(io.open(arg[2], "w"))
local json = unsloth.json
for line in io.lines(jobs) do
  local job = json.decode(line)
  local ok, text = pcall(unsloth.chat_template.render, job.template, job.vars)
  out:write(json.encode { ok = ok, text = tostring(text) }, "\\n")
end
out:close()
"""
NAMED = """
local templates, unsloth = require "unsloth.templates", require "unsloth"
local tok, out = unsloth.AutoTokenizer.from_pretrained(arg[1]), {}
for name in pairs(templates.list) do
  out[name] = unsloth.get_chat_template(tok, { chat_template = name, map_eos_token = false }).chat_template
end
local file = assert(io.open(arg[2], "w"))
file:write(unsloth.json.encode(out))
file:close()
"""


def run_lua(program, source, *args):
    with tempfile.TemporaryDirectory() as folder:
        script = pathlib.Path(folder) / "script.lua"
        script.write_text(source)
        subprocess.run([program, script, *args], check=True)


def ours(program, jobs):
    with tempfile.TemporaryDirectory() as folder:
        given, got = pathlib.Path(folder) / "jobs", pathlib.Path(folder) / "texts"
        given.write_text("".join(json.dumps(job) + "\n" for job in jobs))
        run_lua(program, RENDER, given, got)
        return [json.loads(line) for line in got.read_text().split("\n") if line]


def theirs(job):
    v = dict(job["vars"])
    try:
        texts, _ = render_jinja_template(
            [v.pop("messages")], tools=v.pop("tools", None), documents=v.pop("documents", None), chat_template=job["template"],
            add_generation_prompt=v.pop("add_generation_prompt", False), **v)
        return {"ok": True, "text": texts[0]}
    except Exception as e:  # whatever a template's Python raises
        return {"ok": False, "text": str(e), "raised": type(e).__name__ == "TemplateError"}


def unsloth_templates(folder):
    """The templates and default system messages of unsloth/chat_templates.py, which is not imported: it wants a GPU."""
    tree = ast.parse((pathlib.Path(folder) / "chat_templates.py").read_text())

    def wanted(node):
        if isinstance(node, ast.For):
            return isinstance(node.iter, ast.Tuple)
        names = [t.id if isinstance(t, ast.Name) else getattr(getattr(t, "value", None), "id", "") for t in getattr(node, "targets", [])]
        return isinstance(node, ast.Assign) and any(n.endswith(("_template", "_ollama", "eos_token", "system_message", "CHAT_TEMPLATES",
                                                                "DEFAULT_SYSTEM_MESSAGE")) for n in names)

    scope = {"_ollama_template": lambda name: None}
    for node in tree.body:
        if wanted(node):
            try:
                exec(compile(ast.Module([node], []), "chat_templates.py", "exec"), scope)
            except NameError:
                pass  # a template that is made by functions; ours has none of these
    out = {}
    for name, (template, *_) in scope["CHAT_TEMPLATES"].items():
        out[name] = template.replace("{system_message}", (scope["DEFAULT_SYSTEM_MESSAGE"][name] or "").replace("'", "\\'"))
    return out


WORDS = ["Hello", "  spaces ", "\n", "ünïcödé", "{{ x }}", "<think>", "</think>", "\nthought\n", "<tool_response>", "</tool_response>", "'", '"', "\\", "&<>",
         "日本語", "😀", "\t", "", " ", "a" * 50, "{%", "\u2028", "\x1f", "\r\n", "None"]


def text(r):
    return "".join(r.choice(WORDS) for _ in range(r.randint(0, 5)))


def call(r):
    arguments = {text(r) or "a": r.choice([1, 2.5, True, None, text(r), [1, "x"], {"k": text(r)}]) for _ in range(r.randint(0, 3))}
    function = {"name": r.choice(["get_time", "search"]), "arguments": arguments if r.random() < 0.8 else json.dumps(arguments)}
    return {"type": "function", "id": "abcdefgh%d" % r.randint(0, 9), "function": function} if r.random() < 0.9 else function


def message(r, role):
    m = {"role": role, "content": text(r)}
    if r.random() < 0.05:
        m["content"] = [{"type": "text", "text": text(r)}, {"type": "image"}]
    if r.random() < 0.03:
        m["content"] = None
    if role == "assistant" and r.random() < 0.2:
        m["tool_calls"] = [call(r) for _ in range(r.randint(1, 2))]
    if role == "assistant" and r.random() < 0.2:
        m[r.choice(["reasoning_content", "thinking", "reasoning"])] = text(r)
    return m


def conversation(r):
    if r.random() < 0.5:  # one that every template takes
        roles = r.choice([[], ["system"]]) + ["user", "assistant"] * r.randint(1, 3) + r.choice([[], ["user"]])
        return [{"role": role, "content": text(r)} for role in roles]
    out = [message(r, "system")] if r.random() < 0.4 else []
    for _ in range(r.randint(1, 4)):
        out.append(message(r, "user"))
        if r.random() < 0.15:
            out.append(message(r, r.choice(["tool", "ipython", "system", "user"])))
        if r.random() < 0.85:
            out.append(message(r, "assistant"))
        if r.random() < 0.2:
            out.append(message(r, "tool"))
    return out


SIMPLE = {"type": "function", "function": {"name": "search", "description": "d", "parameters": {"type": "object", "properties": {
    "q": {"type": "string", "description": "what"}, "k": {"type": "array", "items": {"type": "integer"}, "description": "x"}}, "required": []},
    "return": {"type": "string"}}}
TOOL = {"type": "function", "function": {"name": "get_time", "description": "The \"time\" <of> a city's ü", "parameters": {
    "type": "object", "properties": {"city": {"type": "string", "description": "name"}, "n": {"type": ["integer", "null"], "enum": [1, 2.0]}},
    "required": ["city"]}}}


def variables(r):
    v = {"messages": conversation(r), "add_generation_prompt": r.random() < 0.5, "tools": r.choice([[TOOL], [SIMPLE], [TOOL, SIMPLE], []]) if r.random() < 0.3 else None,
         "documents": [{"title": text(r), "text": text(r)}] if r.random() < 0.1 else None, "bos_token": "<s>", "eos_token": "</s>"}
    for name, value in [("enable_thinking", False), ("date_string", "1 May 2025"), ("tools_in_user_message", False),
                        ("builtin_tools", ["code_interpreter", "search"]), ("custom_tools", [SIMPLE])]:
        if r.random() < 0.1:
            v[name] = value
    return v


def reasoned(v):
    """transformers renames reasoning before the template sees it; chat_template.render takes variables as they are."""
    fields = ["reasoning_content", "thinking", "reasoning"]
    return not any(m.get(f) is not None for m in v["messages"] for f in fields)


def published(shared):
    for folder in sorted((shared / "data/chat_templates").iterdir()):
        yield folder.name, (folder / "template.jinja").read_text()
    for folder in sorted((shared / "data/tokenizers").iterdir()):
        path = folder / "tokenizer_config.json"
        raw = path.read_text() if path.exists() else gzip.open(str(path) + ".gz", "rt").read()
        template = json.loads(raw).get("chat_template")
        if template:
            yield folder.name, template


def report(what, rows):
    """rows: (job, reference, ours). Texts are equal, or both raise; what raise_exception says is in our sentence."""
    wrong = [(j, w, g) for j, w, g in rows if w["ok"] != g["ok"] or (w["ok"] and w["text"] != g["text"])
             or (not w["ok"] and w.get("raised") and w["text"] not in g["text"])]
    print("%-60s %5d renderings, %5d of them errors, %d differ" % (what, len(rows), sum(not w["ok"] for _, w, _ in rows), len(wrong)))
    for job, want, got in wrong[:2]:
        print("  vars %s\n  want %r\n  got  %r" % (json.dumps(job["vars"])[:1500], want, got))
    return len(wrong)


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--program", default=ROOT / "build/unsloth-lua")
    p.add_argument("--shared", type=pathlib.Path, default=ROOT.parent / "shared")
    p.add_argument("--unsloth")
    p.add_argument("--rounds", type=int, default=300)
    o = p.parse_args()
    r, wrong = random.Random(7), 0
    sample = [v for v in (variables(r) for _ in range(o.rounds)) if reasoned(v)]
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "named"
        run_lua(o.program, NAMED, o.shared / "data/tokenizers/stories260k", path)
        named = json.loads(path.read_text())
    for what, template in list(published(o.shared)) + sorted(named.items()):
        jobs = [{"template": template, "vars": v} for v in sample]
        wrong += report(what, list(zip(jobs, map(theirs, jobs), ours(o.program, jobs))))
    reference = unsloth_templates(o.unsloth) if o.unsloth else {}
    for name in sorted(set(named) & set(reference)):
        jobs = [{"template": named[name], "vars": v} for v in sample]
        wants = [theirs({"template": reference[name], "vars": v}) for v in sample]
        wrong += report("unsloth's " + name, list(zip(jobs, wants, ours(o.program, jobs))))
    if o.unsloth:
        print("unsloth has no", sorted(set(named) - set(reference)))
    return wrong != 0


if __name__ == "__main__":
    sys.exit(main())
