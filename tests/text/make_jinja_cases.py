#!/usr/bin/env python3
"""Writes jinja_cases.jsonl: small templates, each with the text transformers renders, or with the error's kind.

    python tests/text/make_jinja_cases.py > tests/text/jinja_cases.jsonl

Needs transformers (5.23 made the committed file) and jinja2. error is "raise" where raise_exception spoke, else the name of
the exception; text is then its sentence."""
import json

from transformers.utils.chat_template_utils import _compile_jinja_template

V = {
    "s": "Hello, World", "u": "Grüße 日本 😀 ǅ ß", "q": "a'b\"c\\d\n<&>\t\u2028\x7f", "e": "", "n": None, "t": True, "f": False, "i": 7, "neg": -7, "x": 2.5,
    "big": 1e16, "tiny": 1e-7, "l": [3, 1, 2], "w": ["b", "A", "c", "a"], "d": {"b": 1, "a": [1, None, True], "ü": {"x": 1.0}}, "empty": [], "none": {},
    "rows": [{"k": "x", "v": 2, "o": {"p": 1}}, {"k": "y", "v": 1, "o": {"p": 3}}, {"k": "x", "v": 3, "o": {"p": 2}}],
    "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}],
}

T = []
# White space.
T += ["a\n{% if t %}\n  b\n{% endif %}\nc\n", "a\n  {% if t %}  \nb\n  {% endif %}\n\nc\n\n", "{%- if t -%}  x  {%- endif -%}  y ", "  {%+ if t %}\nx{% endif +%}\n y",
      "a {#- gone -#} b\n{# line #}\nc", "  {# x #}\n  b", "{{ s }}\n\n", "{{- s -}}\n x", " {{ s }} \n", "{% raw %}{{ s }} {% if %}{% endraw %}!", "a{%- raw -%}  x  {%- endraw -%} b",
      "\n\n{% set z = 1 %}\n\nx", "\t{% if t %}\ty{% endif %}", "{% if t %}\r\nx\r\n{% endif %}", "x\ry", "{{ '\\n' }}{{ \"\\t\" }}|{{ 'a\\'b' }}{{ '\\u00e9\\x41' }}", "{{ 'a' 'b' }}",
      "{%if t%}x{%endif%}", "a  {{- '  b' }}", "{% set k = 'v' -%}\n  {{ k }}", "{% for i in l %}\n  {{ i }}\n{% endfor %}\n", "{% for i in l -%}\n  {{ i }}\n{%- endfor %}\nend"]
# Values and their text.
T += ["{{ %s }}" % e for e in """s|u|q|e|n|t|f|i|neg|x|big|tiny|l|d|rows[0]|[q]|[1, 2.0, 'x', none, true]|(1,)|()|(1, 2)|{'a': 1, 2: 'b'}|1e100|1.0|100000000000000000.0|0.1 + 0.2|1/3|-0.0|nope|[nope]|1_000|
7 // 2|-7 // 2|7 % -3|-7 % 3|2 ** 10|2 ** -1|7.5 // 2|-7.5 % 2|1 + true|'a' * 3|[1] * 2|3 * 'ab'|'a' ~ 1 ~ none ~ 2.0|1 / 2 * 3|2 + 3 * 4 ** 2|-2 ** 2|(1 + 2) * 3|'%s-%d-%.2f-%5s|%-5s|%05d' % ('a', 3, 2.5, 'b', 'c', 42)|
1 < 2 < 3|1 < 3 < 2|1 == 1.0|'a' < 'b'|[1, 2] < [1, 3]|1 in l|'a' in d|'Hell' in s|'z' not in s|not t|t and e|e or 'x'|n or f|not n and t|1 is odd|'x' if f|'x' if f else 'y'|n is none|nope is defined|s is string|l is sequence|d is mapping|i is number|
t is number|x is float|i is integer|t is boolean|d is iterable|s is iterable|i is iterable|6 is divisibleby 3|6 is divisibleby(4)|s is not none|i is eq 7|i is sameas 7|'a' is in 'abc'|l is in [l]|s is callable|range is callable|'ab' is lower|'AB' is upper|t is true|f is false""".replace("\n", "").split("|") if e]
# Members and slices.
T += ["{{ %s }}" % e for e in """s[0]|s[-1]|u[7]|s[1:4]|s[::-1]|u[::2]|l[1:]|l[:-1]|l[::-1]|l[10:]|l[-2:]|s[:100]|s[5:2]|l[0]|l[9]|d.b|d['b']|d.a[0]|d.zz|d.zz is defined|d['ü']['x']|rows[-1].o.p|d.items()|d.keys()|d.values()|d.get('b')|d.get('zz', 5)|d.get('zz')|d|length|
messages[0]['role']|messages[1:]|(1, 2, 3)[1]|range(5)|range(5)[2]|range(3)|list|s.upper()|s.lower()|u.upper()|u.lower()|u.title()|u.capitalize()|s.swapcase()|s.split(', ')|' a  b '.split()|'a,b,,c'.split(',', 1)|'a b c'.rsplit(' ', 1)|'x\\ny\\r\\nz'.splitlines()|
' x '.strip()|'xxaxx'.strip('x')|'xxaxx'.lstrip('x')|'xxaxx'.rstrip('x')|s.replace('l', 'L')|s.replace('l', 'L', 1)|s.startswith('Hell')|s.endswith(('x', 'ld'))|s.find('o')|s.find('zz')|s.rfind('o')|s.index('o')|s.count('l')|', '.join(w)|'a-b'.partition('-')|'a-b-c'.rpartition('-')|
'7'.zfill(3)|'ab'.center(6)|'ab'.ljust(4, '.')|'ab'.rjust(4)|'12'.isdigit()|'ab'.isalpha()|'a1'.isalnum()|' '.isspace()|'ab'.islower()|'AB'.isupper()|'{} {}'.format(1, 'a')|'{0}-{name}'.format(1, name='x')|'abc'.removeprefix('a')|'abc'.removesuffix('c')|l.index(1)|l.count(3)|s.title()""".replace("\n", "").split("|") if e]
# Filters.
T += ["{{ %s }}" % e for e in ["s | length", "s | upper | lower", "s | title", "s | capitalize", "'  x ' | trim", "'xxaxx' | trim('x')", "s | replace('o', '0')", "s | replace('l', 'L', 1)", "w | sort", "w | sort(reverse=true)", "w | sort(case_sensitive=true)",
      "rows | sort(attribute='v') | map(attribute='v') | list", "rows | map(attribute='k') | join(', ')", "rows | map(attribute='o.p') | list", "rows | map(attribute='zz', default='-') | list", "w | map('upper') | list", "l | map('string') | join('+')",
      "rows | selectattr('k', 'equalto', 'x') | list | length", "rows | selectattr('v') | map(attribute='v') | sum", "rows | rejectattr('k', 'eq', 'x') | list", "l | select('odd') | list", "l | reject('odd') | list", "l | select('>', 1) | list", "[0, 1, '', 'a'] | select | list",
      "l | sum", "rows | sum(attribute='v')", "l | max", "l | min", "rows | max(attribute='v')", "l | first", "l | last", "empty | first", "l | reverse | list", "s | reverse", "w | unique | list", "rows | groupby('k')", "rows | groupby('k') | map(attribute='grouper') | list",
      "l | batch(2) | list", "l | slice(2) | list", "l | join", "l | join('-')", "rows | join('/', attribute='k')", "nope | default('x')", "e | default('x')", "e | default('x', true)", "n | d('y')", "d | items | list", "d | dictsort", "d | dictsort(reverse=true)", "d | dictsort(by='value') if false else 1",
      "'3.7' | int", "'x' | int(5)", "'0x1F' | int(0, 16)", "3.7 | int", "'2.5' | float", "'x' | float", "2.567 | round(2)", "2.5 | round", "2.1 | round(method='ceil')", "2.55 | round(1, 'floor')", "-3 | abs", "q | escape", "q | e | safe", "q | safe ~ '<'", "q | forceescape", "s | wordcount", "s | center(20)", "q | urlencode",
      "'a\\nb\\n\\nc' | indent", "'a\\nb' | indent(2, true)", "'a\\nb' | indent('> ')", "s | truncate(8)", "s | truncate(8, true)", "s | truncate(8, true, '..', 0)", "s | truncate(9, leeway=0)", "'%s=%s' | format('a', 1)", "s | list", "d | list", "i | string | length", "(1, 2) | list", "l | length", "l | count",
      "'upper' is filter", "d | tojson", "d | tojson(indent=2)", "d | tojson(sort_keys=true)", "d | tojson(ensure_ascii=true)", "d | tojson(separators=(',', ':'))", "q | tojson", "u | tojson(ensure_ascii=true)", "u | tojson", "[] | tojson", "{} | tojson(indent=4)", "[[], {}] | tojson(indent=1)",
      "[1, 2.0, 1e16, 1e-7, none, true, 'x'] | tojson", "{1: 2, none: 3, true: 4, 1.5: 5} | tojson", "(1, (2,)) | tojson", "rows | tojson(indent=2, sort_keys=true, separators=(',', ': '))", "d | tojson(indent='\\t')", "l | tojson(indent=0)", "nope | tojson", "range | tojson", "s | nofilter", "s is notest", "s | upper(1)"]]
# Statements.
T += ["{% for i in l %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.previtem }}{{ loop.nextitem }} {% endfor %}", "{% for i in empty %}x{% else %}none{% endfor %}", "{% for i in l if i > 1 %}{{ loop.index }}:{{ i }} {% else %}no{% endfor %}",
      "{% for k, v in d.items() %}{{ k }}={{ v }};{% endfor %}", "{% for k in d %}{{ k }}{% endfor %}", "{% for c in u %}{{ c }}|{% endfor %}", "{% for i in l %}{% if i == 1 %}{% continue %}{% endif %}{{ i }}{% endfor %}", "{% for i in range(100) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}",
      "{% for i in l %}{% for j in w %}{% if j == 'c' %}{% break %}{% endif %}{{ i }}{{ j }}{% endfor %}{{ loop.cycle('a', 'b') }}{% endfor %}", "{% for i in [1, 1, 2] %}{{ loop.changed(i) }}{% endfor %}", "{% for i in rows recursive %}{{ i.k }}{% if loop.depth < 2 %}{{ loop(rows[:1]) }}{% endif %}{% endfor %}",
      "{% set x = 1 %}{% for i in l %}{% set x = i %}{% endfor %}{{ x }}", "{% set ns = namespace(x=0, y='a') %}{% for i in l %}{% set ns.x = ns.x + i %}{% endfor %}{{ ns.x }}{{ ns.y }}", "{% set a, b = 1, 2 %}{{ a }}{{ b }}", "{% set z %}a{{ s }}b{% endset %}{{ z | upper }}", "{% set z | upper %}abc{% endset %}{{ z }}",
      "{% if n %}a{% elif e %}b{% elif t %}c{% else %}d{% endif %}", "{% macro m(a, b=2) %}[{{ a }},{{ b }}]{% endmacro %}{{ m(1) }}{{ m(1, 3) }}{{ m(b=5, a=4) }}", "{% macro m() %}{{ varargs }}{{ kwargs }}{% endmacro %}{{ m(1, x=2) }}", "{% macro m(a) %}{{ a }}{% endmacro %}{{ m() }}{{ m(1, 2) }}",
      "{% macro f(n) %}{{ n }}{% if n > 0 %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}", "{% macro m() %}<{{ caller(1) }}>{% endmacro %}{% call(x) m() %}c{{ x }}{% endcall %}", "{% call m() %}{% endcall %}", "{% filter upper %}ab{{ s }}{% endfilter %}", "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}{{ a }}",
      "{% generation %}x{{ s }}{% endgeneration %}y", "{%- for m in messages %}\n{%- if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}\n{%- endfor %}", "{% set x = [1] %}{{ x.append(2) }}", "{% do l %}", "{% include 'x' %}", "{% extends 'x' %}", "{{ joiner('|') }}" if False else "{% set j = joiner('|') %}{{ j() }}a{{ j() }}b",
      "{{ range(2, 8, 3) | list }}", "{% for g in rows | groupby('k') %}{{ g.grouper }}{{ g.list | length }}{% endfor %}", "{{ raise_exception('No ' ~ s) }}", "{{ dict(a=1, b=2) }}", "{{ dict(d, c=3) | length }}", "{{ dict([('a', 1)]) }}", "{{ namespace(a=1).a }}", "{{ namespace(_a=1) }}", "{% set ns = namespace() %}{% set ns._a = 1 %}",
      "{{ strftime_now('%Y') | length }}", "{% if strftime_now is defined %}y{% endif %}", "{% set loop_messages = messages[1:] %}{{ loop_messages }}", "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] | trim + '\\n' }}{% endfor %}", "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list | last }}",
      "{% if t %}{% set y = 5 %}{% endif %}{{ y }}", "{% for i in l %}{% set y = i %}{% endfor %}{{ y }}", "{{ self }}" if False else "{{ loop }}", "{% set a = {'x': [1, {'y': 2}]} %}{{ a.x[1].y }}", "{{ [1, 2, 3,] }}{{ {'a': 1,} }}", "{{ 'a' if t else 'b' if f else 'c' }}", "{{ (l | first) + 1 }}", "{{ l | map('abs') | sum + 1 }}"]
# Errors.
T += ["{{ nope.x }}", "{{ nope + 1 }}", "{{ n.x }}", "{{ n.x.y }}", "{{ 1 + 'a' }}", "{{ 'a' + 1 }}", "{{ 1 / 0 }}", "{{ 'a' < 1 }}", "{{ [] - 1 }}", "{% if %}", "{% for %}", "{% endif %}", "{{ 1", "{% if t %}", "{{ }}", "{{ a b }}", "{{ 'x }}", "{# x", "{% foo %}", "{{ s() }}", "{{ nope() }}", "{{ s.nope() }}", "{% for i in 5 %}{% endfor %}", "{% for i in n %}{% endfor %}",
      "{% set a, b = [1] %}", "{{ -'a' }}", "{{ s['__class__'] }}x", "{{ s.__class__.__mro__ }}", "{{ l.append(1) }}", "{{ d.update({}) }}", "{{ d.pop('a') }}", "{{ range(10000000) }}", "{{ 'a'.index('z') }}", "{% break %}", "{{ {[]: 1} }}", "{{ 1 if }}", "{{ x[ }}", "{{ %}", "{{ 1..2 }}", "{{ t.x.y }}", "{{ ''.join([1]) }}", "{{ int('3') }}", "{{ l | sort(attribute='x') }}", "{{ ['a', 1] | sort }}", "{{ [none, 1] | max }}"]


def main():
    for template in T:
        try:
            case = {"rendered": _compile_jinja_template(template).render(**V)}
        except Exception as e:
            case = {"error": "raise" if type(e).__name__ == "TemplateError" else type(e).__name__, "text": str(e)}
        print(json.dumps({"template": template, **case}))


print(json.dumps({"vars": V}))
main()
