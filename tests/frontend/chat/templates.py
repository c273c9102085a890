"""Chat templates in the manner of published ones: the same constructs and markers, written for tests."""

_BAR, _LOW = "\uff5c", "\u2581"


def _deepseek(text: str) -> str:
    return text.replace("[[", f"<{_BAR}").replace("]]", f"{_BAR}>").replace("@", _LOW)


# Roles behind full-width markers, tool calls as blocks of JSON, a namespace that loops change.
DEEPSEEK_R1 = _deepseek(
    """
{%- set ns = namespace(first=true, system='', tools_open=false) -%}
{%- for message in messages if message.role == 'system' -%}
  {%- set ns.system = ns.system + ('' if loop.first else '\n\n') + message.content -%}
{%- endfor -%}
{{- bos_token -}}{{- ns.system -}}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {%- set ns.tools_open = false -%}
    {{- '[[User]]' + message['content'] -}}
  {%- elif message['role'] == 'assistant' and message.get('tool_calls') -%}
    {{- '[[Assistant]][[tool@calls@begin]]' -}}
    {%- for call in message['tool_calls'] -%}
      {{- '' if loop.first else '\n' -}}
      {{- '[[tool@call@begin]]' + call.type + '[[tool@sep]]' + call.function.name + '\n```json\n' -}}
      {{- call.function.arguments + '\n```[[tool@call@end]]' -}}
    {%- endfor -%}
    {{- '[[tool@calls@end]]' + eos_token -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '[[Assistant]]' + message['content'].split('</think>')[-1] + eos_token -}}
  {%- elif message['role'] == 'tool' -%}
    {%- if not ns.tools_open -%}{{- '[[tool@outputs@begin]]' -}}{%- set ns.tools_open = true -%}{%- endif -%}
    {{- '[[tool@output@begin]]' + message['content'] + '[[tool@output@end]]' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[[Assistant]]<think>\n' -}}{%- endif -%}
"""
)

# Reasoning by request, and a macro.
DEEPSEEK_V31 = _deepseek(
    """
{%- if not thinking is defined -%}{%- set thinking = false -%}{%- endif -%}
{%- macro said(role, text) -%}{{ '[[' ~ role ~ ']]' ~ text }}{%- endmacro -%}
{{- bos_token -}}
{%- if tools -%}{{- '## Tools\n' ~ (tools | tojson(indent=2)) ~ '\n' -}}{%- endif -%}
{%- for message in messages -%}
  {%- if message.role == 'system' -%}{%- continue -%}{%- endif -%}
  {{- said(message.role | capitalize, message.content or '') -}}
  {%- for call in message.tool_calls or [] -%}
    {{- '[[tool@call@begin]]' ~ call.function.name ~ '[[tool@sep]]' ~ call.function.arguments -}}
    {{- '[[tool@call@end]]' -}}
  {%- endfor -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[[Assistant]]' ~ ('<think>' if thinking else '</think>') -}}{%- endif -%}
"""
)

# Blocks that are trimmed, tools as JSON lines, a reverse loop, and tests on types.
QWEN3 = """
{%- if tools %}
    {{- '<|im_start|>system\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\n\n' }}
    {%- endif %}
    {{- "# Tools\n\n<tools>" }}
    {%- for tool in tools %}
        {{- "\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\n</tools>\nCalls stand in <tool_call></tool_call>.<|im_end|>\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
    {%- elif message.role == 'assistant' %}
        {%- set thoughts = '' %}
        {%- if message.reasoning_content is string %}
            {%- set thoughts = message.reasoning_content %}
        {%- endif %}
        {%- set text = message.content.split('</think>')[-1].lstrip('\n') %}
        {{- '<|im_start|>' + message.role + '\n' }}
        {%- if loop.index0 > ns.last and thoughts %}
            {{- '<think>\n' + thoughts.strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- text }}
        {%- for tool_call in message.tool_calls or [] %}
            {%- if tool_call.function %}
                {%- set tool_call = tool_call.function %}
            {%- endif %}
            {{- '\n<tool_call>\n{"name": "' + tool_call.name + '", "arguments": ' }}
            {%- if tool_call.arguments is string %}
                {{- tool_call.arguments }}
            {%- else %}
                {{- tool_call.arguments | tojson }}
            {%- endif %}
            {{- '}\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.first or (messages[loop.index0 - 1].role != 'tool') %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}
            {{- '<|im_end|>\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>\n\n' }}
    {%- endif %}
{%- endif %}
"""

# What else templates use: generation marks, dict, sorting, trimmed lines.
OTHERS = """
{% set seen = dict(a=1) %}
{% for message in messages %}
    {% if message.role == 'assistant' %}
        {% generation %}
{{ message.content | trim }}
        {% endgeneration %}
    {% else %}
{{ loop.index }}: {{ message.content | upper }} {{ message | dictsort | first | first }}
    {% endif %}
    {% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{{ seen.items() | list }} {{ {'z': '<é>'} | tojson(indent=1, ensure_ascii=True) }}
"""

TEMPLATES = {"deepseek-r1": DEEPSEEK_R1, "deepseek-v3.1": DEEPSEEK_V31, "qwen3": QWEN3, "others": OTHERS}
