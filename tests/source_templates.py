"""Chat templates that write what families of models write, each said shortly here, and their special tokens.

The families' own files are not at hand in every checkout, and none is packaged here.
"""

CHATML_TURN = "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"

# A default system text.
QWEN2 = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou are Qwen.<|im_end|>\\n' }}{% endif %}"
    "{% for m in messages %}" + CHATML_TURN + "{% endfor %}" + ASKED
)

# Empty thoughts before the last answer, if a user has spoken before it; earlier thoughts are cut off.
QWEN3 = """
{%- set ns = namespace(asked=-1) %}
{%- for m in messages if m.role == 'user' %}{% set ns.asked = messages.index(m) %}{% endfor %}
{%- for m in messages %}
    {%- if m.role != 'assistant' %}
        {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
    {%- else %}
        {%- set thought = m.content.split('</think>')[0].split('<think>')[-1].strip('\\n') if '</think>' in m.content %}
        {%- set content = m.content.split('</think>')[-1].lstrip('\\n') if '</think>' in m.content else m.content %}
        {%- if loop.last %}
            {{- '<|im_start|>assistant\\n<think>\\n' + (thought or '') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' + content }}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

# The system text in the first user turn, before every turn a space; other orders are refused.
MISTRAL = """
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{{- bos_token }}
{%- for m in (messages[1:] if messages[0].role == 'system' else messages) %}
    {%- if m.role != ['user', 'assistant'][loop.index0 % 2] %}
        {{- raise_exception('roles must alternate') }}
    {%- endif %}
    {{- ' [INST] ' + (system if loop.first else '') + m.content + ' [/INST]' if m.role == 'user'
        else ' ' + m.content + eos_token }}
{%- endfor %}
"""

# As the first ones: no system text at all.
MISTRAL_PLAIN = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role != ['user', 'assistant'][loop.index0 % 2] %}{{ raise_exception('user, assistant') }}{% endif %}"
    "{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else m.content + eos_token }}{% endfor %}"
)

# A system part with a date in any case, and texts are trimmed.
LLAMA3 = """
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' %}
{%- endif %}
{%- set system = messages[0].content | trim if messages[0].role == 'system' else '' %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + date_string + '\\n\\n' + system + '<|eot_id|>' }}
{%- for m in messages if m.role != 'system' %}
    {{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

# Newlines that stand outside of blocks, the end token after each turn, and marks around responses.
ZEPHYR = """{% for m in messages %}
{% if m.role == 'assistant' %}
{{ '<|assistant|>\\n' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}

{% else %}
{{ '<|' + m.role + '|>\\n' + m.content + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

# Nothing for a generation prompt.
NO_PROMPT = "{% for m in messages %}" + CHATML_TURN + "{% endfor %}"

SOURCES = {
    "qwen2": QWEN2, "qwen3": QWEN3, "mistral": MISTRAL, "mistral_plain": MISTRAL_PLAIN, "llama3": LLAMA3,
    "zephyr": ZEPHYR, "no_prompt": NO_PROMPT,
}  # fmt: skip

EACH = "{% for m in messages %}<|{{ m.role }}|>"
# What cannot be cut, and a word of why.
BROKEN = {
    "no template": (None, "none"),
    "no Jinja": ("{% for m in messages %}{{ m.content }", "TemplateSyntaxError"),
    "it raises": ("{{ raise_exception('not a chat model') }}", "not a chat model"),
    "out of the sandbox": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
    "today's date": ("{{ strftime_now('%d') }}", "strftime_now"),
    "another text": (EACH + "{{ m.content | upper }}</s>{% endfor %}", "text"),
    "the text's length": (EACH + "{{ m.content | length }} {{ m.content }}</s>{% endfor %}", "first user turn"),
    "the turn's number": (EACH + "{{ loop.index }}{{ m.content }}</s>{% endfor %}", "first user turn"),
    "no end": ("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "ends"),
    "some white space": (EACH + "{{ m.content.rstrip() }}</s>{% endfor %}", "pieces"),
    "short texts only": (EACH + "{{ m.content if m.content | length < 20 else '' }}</s>{% endfor %}", "pieces"),
}
