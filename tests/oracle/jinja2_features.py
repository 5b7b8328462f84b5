"""What Jinja2, set up as transformers sets it up, makes of the constructs that published chat templates use.

    jinja2_features.py OUTPUT.json
"""

import json
import sys

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """`{% generation %}` as transformers' AssistantTracker renders it: its content, nothing more."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_body", []), [], [], body).set_lineno(line)

    def _body(self, caller):
        return caller()


def environment():
    def raise_exception(text):
        raise jinja2.exceptions.TemplateError(text)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    env.filters["tojson"] = tojson
    env.globals["raise_exception"] = raise_exception
    return env


MESSAGES = [
    {"role": "system", "content": "You are terse."},
    {"role": "user", "content": "  Wie tief ist der Priel? 潮 <b>&</b> \"x\" 'y'\n"},
    {"role": "assistant", "content": "Zwei Meter.", "tool_calls": [
        {"id": "a1", "type": "function", "function": {"name": "depth", "arguments": {"at": "mouth", "n": 3, "deep": True, "to": None}}}
    ]},
    {"role": "tool", "content": "2.0"},
    {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "text", "text": "now?"}]},
]

TOOLS = [{
    "type": "function",
    "function": {
        "name": "depth",
        "description": "Depth in m\u00e8tres \u2014 <at> a \"place\"\t\u0001",
        "parameters": {"type": "object", "properties": {"z": {"type": "number", "default": 0.5}, "a": {"enum": [1, 2.0, 1e-7, 1e20, None, False]}}, "required": []},
    },
}]

TEMPLATES = {
    "tojson": "{{ tools | tojson }}",
    "tojson with indent": "{{ tools | tojson(indent=4) }}\n{{ tools[0] | tojson(indent=2) }}{{ [] | tojson(indent=2) }}{{ {} | tojson(indent=2) }}",
    "tojson options": "{{ tools | tojson(sort_keys=true) }}{{ 'é' | tojson(ensure_ascii=true) }}{{ [1, {'a': 2}] | tojson(separators=(',', ':')) }}",
    "printing values": "{{ none }} {{ true }} {{ false }} {{ 1 }} {{ 1.0 }} {{ 0.1 }} {{ 1e16 }} {{ 1e-5 }} {{ -3 }} {{ missing }}|{{ [1, 'a', none, true, 2.5] }} {{ {'k': 'it\\'s', 'n': None} }} {{ messages[2].tool_calls }}",
    "concatenation": "{{ 'a' ~ 1 ~ none ~ true ~ 1.5 ~ ['x'] }}{{ 'n=' + 3 | string }}{{ true | string }}{{ none | string }}",
    "white space": "{% for m in messages %}\n  {% if m.role == 'user' %}\n    u\n  {% else %}\n    o\n  {% endif %}\n{% endfor %}\n  end  \n",
    "white space control": "a\n   {%- if true %}\n b\n  {%- endif -%}\n  c {{- ' d' -}}   e\n{# comment #}\nf {#- g -#} h\n",
    "trailing newline": "text\n\n",
    "loop variables": "{% for m in messages %}{{ loop.index }}/{{ loop.index0 }}/{{ loop.first }}/{{ loop.last }}/{{ loop.length }}/{{ loop.revindex }}/{{ loop.previtem.role if loop.previtem is defined }}/{{ loop.nextitem.role if not loop.last }};{% endfor %}",
    "break and continue": "{% for m in messages %}{% if m.role == 'assistant' %}{% continue %}{% endif %}{% if m.role == 'tool' %}{% break %}{% endif %}{{ m.role }},{% endfor %}",
    "loop with else and filter": "{% for m in messages if m.role == 'nobody' %}x{% else %}none{% endfor %}{% for m in messages if m.role != 'user' %}{{ loop.index }}{{ m.role }} {% endfor %}",
    "namespace": "{% set ns = namespace(found=false, n=0, last='') %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.found = true %}{% set ns.n = ns.n + 1 %}{% set ns.last = m.content %}{% endif %}{% endfor %}{{ ns.found }}{{ ns.n }}{{ ns.last[0].text }}",
    "scoping": "{% set x = 1 %}{% for m in messages %}{% set x = x + 1 %}{% endfor %}{{ x }}{% if true %}{% set x = 9 %}{% endif %}{{ x }}",
    "slices": "{{ messages[1:] | length }}{{ messages[::-1][0].role }}{{ messages[-1].role }}{{ messages[:-1] | length }}{{ 'abcdef'[1:4] }}{{ 'abcdef'[-2:] }}{{ 'abcdef'[::-1] }}",
    "string methods": "{{ '  a b '.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ ' a'.lstrip() }}|{{ 'a\\n\\n'.rstrip('\\n') }}|{{ 'a,b,c'.split(',') }}|{{ 'a b  c'.split() }}|{{ 'a,b,c'.split(',')[-1] }}|{{ 'abc'.startswith('ab') }}|{{ 'abc'.endswith('x') }}|{{ 'aXa'.replace('X', '-') }}|{{ 'aB'.upper() }}{{ 'aB'.lower() }}{{ 'ab cd'.title() }}{{ 'ab'.capitalize() }}|{{ 'a-b'.find('-') }}|{{ ', '.join(['a', 'b']) }}|{{ 'a</think>b'.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') }}",
    "starts with one of several": "{{ '<tool>x'.startswith(('<tool>', '<x>')) }}{{ 'y'.endswith(('a', 'b')) }}",
    "dict methods": "{% for k, v in {'b': 1, 'a': 2}.items() %}{{ k }}={{ v }};{% endfor %}{{ {'a': 1}.get('a') }}{{ {'a': 1}.get('b') }}{{ {'a': 1}.get('b', 'd') }}{{ {'b': 1, 'a': 2}.keys() | list }}{{ {'b': 1, 'a': 2}.values() | list }}",
    "items and sort": "{% for k, v in tools[0].function.parameters.properties | dictsort %}{{ k }} {% endfor %}{% for k, v in messages[2].tool_calls[0].function.arguments | items %}{{ k }}:{{ v }} {% endfor %}",
    "tests": "{{ messages is iterable }}{{ messages[0] is mapping }}{{ 'a' is string }}{{ messages[4].content is string }}{{ missing is defined }}{{ none is none }}{{ 1 is number }}{{ true is boolean }}{{ true is true }}{{ messages is sequence }}{{ 2 is even }}{{ 3 is odd }}{{ 'a' in 'cat' }}{{ 'role' in messages[0] }}{{ 'x' not in ['y'] }}{{ missing is undefined }}{{ 1 is integer }}{{ 1.5 is float }}{{ 'a' is eq 'a' }}",
    "text is iterable and a sequence": "{{ 'a' is iterable }}{{ 'a' is sequence }}{{ {} is iterable }}{{ {} is sequence }}",
    "filters": "{{ messages | map(attribute='role') | list | join(',') }}|{{ messages | selectattr('role', 'equalto', 'user') | list | length }}|{{ messages | rejectattr('role', 'equalto', 'user') | map(attribute='role') | join(' ') }}|{{ ' x ' | trim }}|{{ 'a' | upper }}|{{ [3, 1] | sort }}|{{ [1, 2] | first }}{{ [1, 2] | last }}|{{ missing | default('d') }}|{{ '' | default('e', true) }}|{{ 'abc' | length }}|{{ 'a\\nb' | indent(2) }}|{{ [1, 2] | sum }}|{{ 'aXb' | replace('X', '') }}|{{ '3' | int + 1 }}|{{ 2.5 | round }}|{{ ['a', 'b'] | reverse | list }}|{{ ['a', 'a'] | unique | list }}",
    "safe and escape": "{{ messages[1].content | safe }}{{ '<' | e }}",
    "macros": "{% macro turn(role, text='-') %}[{{ role }}: {{ text }}]{% endmacro %}{{ turn('user') }}{{ turn('bot', text='hi') }}{% macro rec(n) %}{{ n }}{% if n > 0 %}{{ rec(n - 1) }}{% endif %}{% endmacro %}{{ rec(3) }}",
    "set block": "{% set text %}\n  {{ messages[0].content }}\n{% endset %}[{{ text }}]{% set a, b = 1, 2 %}{{ a }}{{ b }}",
    "arithmetic": "{{ 7 // 2 }} {{ 7 / 2 }} {{ 7 % 3 }} {{ 2 ** 3 }} {{ 4 / 2 }} {{ -7 // 2 }} {{ 1 + 1.0 }} {{ [1] + [2] }} {{ 'ab' * 2 }} {{ 1 < 2 }} {{ 1 == 1.0 }} {{ 1 if false }}|",
    "conditions": "{{ 'a' if messages else 'b' }}{{ 'a' if [] else 'b' }}{{ '' or 'x' }}{{ 0 and 1 }}{{ not none }}{{ none or 'z' }}{{ 'p' if missing is defined and missing else 'q' }}{{ messages[0].missing is defined }}",
    "range and enumerate": "{% for i in range(3) %}{{ i }}{% endfor %}{% for i in range(2, 8, 3) %}{{ i }}{% endfor %}{% for i in range(messages | length - 1, -1, -1) %}{{ i }}{% endfor %}",
    "generation tags": "{% for m in messages[:3] %}{% if m.role == 'assistant' %}\n    {% generation %}\n    {{ m.content }}{{ eos_token }}\n    {% endgeneration %}\n{% else %}{{ m.role }}{% endif %}{% endfor %}{%- generation -%} x {%- endgeneration -%} ",
    "nested quotes": "{{ \"it's\" }}{{ 'say \"hi\"' }}{{ 'tab\\t|nl\\n|uni\\u00e9' }}",
    "call with filter block": "{% filter upper %}abc{% endfilter %}{% with x = 3 %}{{ x }}{% endwith %}",
    "content parts": "{% for m in messages %}{% if m.content is string %}{{ m.content | trim }}{% else %}{% for part in m.content %}{% if part.type == 'text' %}{{ part['text'] }} {% endif %}{% endfor %}{% endif %};{% endfor %}",
}

RAISES = {
    "raise_exception": ("{{ raise_exception('Roles must alternate: ' ~ messages[0].role) }}", "Roles must alternate: system"),
    "raise inside a macro": ("{% macro f() %}{{ raise_exception('no') }}{% endmacro %}{% for m in messages %}{{ f() }}{% endfor %}", "no"),
}


def main(output):
    env = environment()
    context = {"messages": MESSAGES, "tools": TOOLS, "eos_token": "</s>", "add_generation_prompt": True}
    cases = []
    for name, template in TEMPLATES.items():
        cases.append({"name": name, "template": template, "text": env.from_string(template).render(**context)})
    for name, (template, text) in RAISES.items():
        try:
            env.from_string(template).render(**context)
            raise SystemExit(f"{name}: did not raise")
        except jinja2.exceptions.TemplateError as error:
            assert str(error) == text
        cases.append({"name": name, "template": template, "raises": text})
    result = {"made_with": {"jinja2": jinja2.__version__}, "messages": MESSAGES, "tools": TOOLS, "cases": cases}
    with open(output, "w", encoding="utf-8") as file:
        json.dump(result, file, ensure_ascii=False, indent=1)
        file.write("\n")


main(sys.argv[1])
