"""Chat templates: the texts that transformers makes, and an end to what a hostile template does."""

from __future__ import annotations

import datetime
import json
import signal
import subprocess
import sys
import threading
import time

import pytest
from transformers import PreTrainedTokenizerFast

from butler_jax.text.chat_template import LONGEST_TEMPLATE, ChatTemplate, ChatTemplateError
from butler_jax.text.tokenizer import Tokenizer, train_bpe

TEMPLATES = {
    "turns": """\
{% for message in messages %}
    {% if loop.first and message['role'] != 'system' %}
        {{ '<|im_start|>system\\nBe short.<|im_end|>\\n' }}
    {% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{% endif %}
""",
    "instructions": """\
{%- if messages[0]['role'] == 'system' -%}
  {%- set system = messages[0]['content'] | trim %}{% set turns = messages[1:] -%}
{%- else -%}
  {%- set system = '' %}{% set turns = messages -%}
{%- endif -%}
{{ bos_token }}
{%- for message in turns -%}
  {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
    {{ raise_exception('roles must alternate user/assistant/user/assistant/...') }}
  {%- endif -%}
  {%- if message.role == 'user' -%}
    {{ ' [INST] ' ~ (system ~ '\\n\\n' if loop.first and system else '') ~ message.content.strip() ~ ' [/INST]' }}
  {%- else -%}
    {% generation %}{{ ' ' + message.content.strip() + eos_token }}{% endgeneration %}
  {%- endif -%}
{%- endfor -%}
""",
    "thoughts": """\
{%- set ns = namespace(last=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- if tools %}
    {{- '<tools>\\n' }}
    {%- for tool in tools %}{{ tool | tojson }}{{ '\\n' }}{% endfor %}
    {{- '</tools>\\n' }}
{%- endif %}
{%- macro say(role, text) -%}
<{{ role }}>{{ text }}</{{ role }}>
{%- endmacro %}
{%- for message in messages %}
    {%- if message.content is not string %}{% continue %}{% endif %}
    {%- set text = message.content.split('</think>')[-1].lstrip('\\n') if loop.index0 < ns.last else message.content %}
    {{- say(message.role, text) }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<assistant>' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}
""",
    "dates": """\
{%- if strftime_now is defined %}{% set today = strftime_now('%d %b %Y') %}{% else %}{% set today = '?' %}{% endif -%}
{{ bos_token }}Today Date: {{ today }}
{% for message in messages | selectattr('role', 'ne', 'system') | list %}
{{ loop.index }}/{{ loop.length }} {{ {'é': message.content, 'ok': true} | tojson(indent=2) }}
{{ missing | default('none') }}
{% break %}
{% endfor %}
{{ unk_token }}{{ documents | length if documents else 'no documents' }}
""",
}
TALK = [
    {"role": "user", "content": '  <What> is "é"?\n'},
    {"role": "assistant", "content": "<think>\nwell\n</think>\n\nA letter. "},
    {"role": "user", "content": "And 🙂?"},
]
TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"word": {"type": "string"}}}}]
SYSTEM = {"role": "system", "content": " Be kind. "}


@pytest.fixture(scope="module")
def backend():
    return train_bpe(["a b c"], 300, ("<s>", "</s>")).backend


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("system", [True, False])
def test_texts_are_those_of_transformers(backend, name, system):
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    theirs = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=TEMPLATES[name], **tokens)
    ours = ChatTemplate({"default": TEMPLATES[name]}, tokens)
    messages = [SYSTEM, *TALK] if system else TALK
    for how in (
        dict(add_generation_prompt=True),
        dict(add_generation_prompt=False),
        dict(add_generation_prompt=True, tools=TOOLS, variables={"enable_thinking": False}),
    ):
        given = {**how, **how.get("variables", {})}
        assert ours.render(messages, **how) == theirs.apply_chat_template(messages, tokenize=False, **given)
    if name != "dates":  # which shows the first message alone
        how = dict(add_generation_prompt=False, continue_final_message=True)
        begun = messages[:-1]
        assert ours.render(begun, **how) == theirs.apply_chat_template(begun, tokenize=False, **how)


def test_what_is_set_in_the_answer_and_a_list_of_parts_are_as_in_transformers():
    said = "{% for m in messages %}{% generation %}{% set x = 5 %}{{ m.content }}{% endgeneration %}{{ x }}{% endfor %}"
    parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    begun = [{"role": "user", "content": [{"type": "text", "text": "hello"}, {"type": "text", "text": "wor"}]}]
    backend = train_bpe(["a b c"], 300).backend
    for template, messages, how in ((said, TALK, {}), (parts, begun, dict(continue_final_message=True))):
        theirs = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
        wanted = theirs.apply_chat_template(messages, tokenize=False, **how)
        assert ChatTemplate({"default": template}, {}).render(messages, add_generation_prompt=False, **how) == wanted


def test_of_several_templates_the_asked_one_is_taken(tmp_path):
    train_bpe(["a b c"], 300).save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "plain {{ eos_token }}"}, {"name": "tool_use", "template": "tools"}]
    path.write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}, "chat_template": named}))
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path / "again")
    for template in (tokenizer.chat_template, Tokenizer.load(tmp_path / "again").chat_template):
        assert template.render(TALK) == "plain <|endoftext|>"
        assert template.render(TALK, tools=TOOLS) == template.render(TALK, name="tool_use") == "tools"
        with pytest.raises(ValueError, match="no chat template 'rag'; there are: default, tool_use"):
            template.render(TALK, name="rag")
    (tmp_path / "chat_template.jinja").write_text("of a file")  # which transformers prefers too
    assert Tokenizer.load(tmp_path).chat_template.render(TALK) == "of a file"
    (tmp_path / "chat_template.jinja").unlink()
    path.write_text(json.dumps({"chat_template": {"default": "x"}}))
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: chat_template must be a text or a list"):
        Tokenizer.load(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="the model has no chat template"):
        Tokenizer.load(tmp_path).require_chat_template()


@pytest.mark.parametrize("default", [True, False])
def test_further_templates_of_a_directory_are_those_of_transformers(backend, tmp_path, default):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template="of the config")
    tokenizer.save_pretrained(tmp_path, save_jinja_files=False)
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "rag.v2.jinja").write_text("rag {{ documents }}")
    (more / "notes.txt").write_text("no template")
    if default:
        (tmp_path / "chat_template.jinja").write_text("of a file")
    ours = Tokenizer.load(tmp_path).chat_template.sources
    assert ours == PreTrainedTokenizerFast.from_pretrained(tmp_path).chat_template
    Tokenizer.load(tmp_path).save(tmp_path / "again")
    assert Tokenizer.load(tmp_path / "again").chat_template.sources == ours
    (more / "away.jinja").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match="is a link that leaves its directory"):
        Tokenizer.load(tmp_path)


def test_variables_of_a_template_have_any_name_but_those_of_arguments():
    template = ChatTemplate({"default": "{{ name }} {{ source }} {{ bos_token }}"}, {"bos_token": "<s>"})
    assert template.render(TALK, variables={"name": "x", "source": "y"}) == "x y <s>"
    assert template.render(TALK, variables={"name": "x", "bos_token": "<b>"}) == "x  <b>"  # as in transformers
    for taken in ("messages", "tools", "documents", "add_generation_prompt"):
        with pytest.raises(ValueError, match=f"cannot be called {taken}; give the argument of that name"):
            template.render(TALK, variables={taken: []})


HOSTILE = {
    "{{ raise_exception('roles must alternate') }}": "it says: roles must alternate",
    "{% if %}": "line 1: Expected an expression",
    "{{ ''.__class__.__mro__ }}": "unsafe",
    "{{ messages.append(1) }}": "unsafe",
    "{% include '/etc/passwd' %}": "no loader",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ 'a' * 10**10 }}": "more than 512 MiB",
    "{% for a in range(99999) %}{{ 'a' * 100 }}{% endfor %}": "more than 4194304 characters",
    " " * (LONGEST_TEMPLATE + 1): "at most 262144 are taken",
    "{{ 9 ** (9 ** 9) }}": "did not end within 2 s",  # a loop inside of C
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "did not end within 2 s",
}


LAST = list(HOSTILE)[-1]


@pytest.mark.parametrize(
    "source",
    [pytest.param(source, id=source[:24], marks=[pytest.mark.slow] * (source == LAST)) for source in HOSTILE],
)
def test_a_hostile_template_ends_in_an_error_in_any_thread(source):
    found = []

    def render():
        with pytest.raises(ChatTemplateError, match=HOSTILE[source]):
            ChatTemplate({"default": source}).render(TALK)
        found.append(ChatTemplate({"default": "next"}).render(TALK))

    thread, began = threading.Thread(target=render, daemon=True), time.monotonic()
    thread.start()
    thread.join(60)
    assert found == ["next"] and time.monotonic() - began < 60


def test_a_loop_ends_also_where_the_parent_ignores_the_signal_of_the_limit():
    """libtpu ignores SIGPROF in every process that loads it, and new processes inherit what is ignored or blocked."""
    program = f"""
import signal
from butler_jax.text.chat_template import ChatTemplate, ChatTemplateError
signal.signal(signal.SIGPROF, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, {{signal.SIGPROF}})
try:
    ChatTemplate({{"default": {LAST!r}}}).render({TALK!r})
except ChatTemplateError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "did not end within 2 s" in done.stdout, done.stderr


def test_after_an_interruption_the_next_text_is_its_own():
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    assert ChatTemplate({"default": "ready"}).render(TALK) == "ready"
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(KeyboardInterrupt):
            ChatTemplate({"default": LAST}).render(TALK)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ChatTemplate({"default": "next"}).render(TALK) == "next"


@pytest.mark.parametrize("messages", [[], "hello", [{"content": "x"}], [["user", "x"]], None, [{"role": 1}]])
def test_what_is_no_conversation_is_said(messages):
    with pytest.raises(ValueError, match="object with role and content"):
        ChatTemplate({"default": "x"}).render(messages)
    with pytest.raises(ValueError, match="must be JSON values"):
        ChatTemplate({"default": "x"}).render([{"role": "user", "content": datetime.date(2020, 1, 1)}])
