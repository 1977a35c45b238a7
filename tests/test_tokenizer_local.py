"""Local tokenizers: the same tokens as an engine makes, and clear words about what can't be used."""

from __future__ import annotations

import asyncio
import builtins
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from kvindexer.errors import PromptRefusedError
from kvindexer.tokenization.blocks import pack_tokens
from kvindexer.tokenization.local import LocalTokenizer, UnusableTokenizerError
from kvindexer.tokenization.tokenizer import Chat, Completion, Text, Tokenized
from tokenizing import ids, make_tokenizer

SECRET = "Zanzibar"


def tokens(directory: Path, text: Text, **options: Any) -> Tokenized:
    async def run() -> Tokenized:
        tokenizer = LocalTokenizer(directory, **options)
        try:
            return await tokenizer.tokenize(text)
        finally:
            await tokenizer.close()

    return asyncio.run(run())


def rendered(directory: Path, chat: Chat) -> str:
    return LocalTokenizer(directory)._template.render(chat)


def user(content: Any, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def packed(text: str) -> Tokenized:
    return Tokenized(pack_tokens(ids(text)))


def test_a_prompt_gets_special_tokens_unless_told_otherwise(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    assert tokens(tmp_path, Completion("the quick fox")) == packed("<s> the quick fox")
    assert tokens(tmp_path, Completion("the quick fox", add_special_tokens=False)) == packed("the quick fox")
    assert tokens(tmp_path / "tokenizer.json", Completion("")) == packed("<s>")


def test_a_chat_gets_those_of_its_template_only(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    assert tokens(tmp_path, Chat([user("the dog")])) == packed("<s> user the dog </s> assistant")
    chat = Chat([user("the dog")], add_generation_prompt=False, add_special_tokens=True)
    assert tokens(tmp_path, chat) == packed("<s> <s> user the dog </s>")


def test_special_tokens_in_a_text_are_special_tokens(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    assert tokens(tmp_path, Completion("fox</s>dog")) == packed("<s> fox </s> dog")


@pytest.mark.parametrize(("adds_bos", "wanted"), [(True, False), (False, True), (True, True), (False, False)])
def test_the_configuration_decides_about_the_first_token(tmp_path: Path, *, adds_bos: bool, wanted: bool) -> None:
    make_tokenizer(tmp_path, adds_bos=adds_bos, add_bos_token=wanted)
    assert tokens(tmp_path, Completion("fox")) == packed("<s> fox" if wanted else "fox")
    assert tokens(tmp_path, Completion("fox", add_special_tokens=False)) == packed("fox")


def test_truncation_and_padding_left_in_the_file_do_nothing(tmp_path: Path) -> None:
    file = make_tokenizer(tmp_path) / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    tokenizer.save(str(file))
    assert tokens(tmp_path, Completion("the dog " * 10)) == packed("<s> " + "the dog " * 10)


def test_the_loop_has_its_turn_while_a_long_text_is_tokenized(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)

    async def run() -> int:
        tokenizer = LocalTokenizer(tmp_path)
        task = asyncio.create_task(tokenizer.tokenize(Completion("the dog " * 150_000)))
        turns = 0
        while not task.done():
            await asyncio.sleep(0.001)
            turns += 1
        assert len((await task).tokens) == 4 * 300_001
        await tokenizer.close()
        return turns

    assert asyncio.run(run()) > 10


# Where templates lie


def test_the_newest_form_of_a_template_wins(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, template="one")
    chat = Chat([user("x")])
    assert rendered(tmp_path, chat) == "one"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "two"}))
    assert rendered(tmp_path, chat) == "two"
    (tmp_path / "chat_template.jinja").write_text("three")
    assert rendered(tmp_path, chat) == "three"
    (tmp_path / "mine.jinja").write_text("the dog")
    assert tokens(tmp_path, chat, chat_template=tmp_path / "mine.jinja") == packed("the dog")


def test_tools_have_a_template_of_their_own_if_there_is_one(tmp_path: Path) -> None:
    templates = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "{{ tools | tojson }}"}]
    make_tokenizer(tmp_path, template=templates)  # type: ignore[arg-type]
    assert rendered(tmp_path, Chat([user("x")])) == "plain"
    tool = {"type": "function", "function": {"parameters": {"b": 1, "a": "<é>"}, "name": "f"}}
    assert rendered(tmp_path, Chat([user("x")], tools=[tool])) == (
        '[{"type": "function", "function": {"name": "f", "description": null, "parameters": {"b": 1, "a": "<é>"}}}]'
    )
    make_tokenizer(tmp_path / "b", template="plain")
    (tmp_path / "b" / "additional_chat_templates").mkdir()
    (tmp_path / "b" / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert rendered(tmp_path / "b", Chat([user("x")], tools=[tool])) == "tools"


def test_a_model_without_template_takes_prompts_and_refuses_chats(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, template=None)
    assert tokens(tmp_path, Completion("fox")) == packed("<s> fox")
    with pytest.raises(PromptRefusedError, match="no chat template") as caught:
        tokens(tmp_path, Chat([user("fox")]))
    assert "chat_template" in caught.value.hint


# What templates may expect


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ strftime_now('%Y') }}", str(datetime.now().year)),  # noqa: DTZ005
        ("{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "user"),
        ("{% for m in messages %}{% if m.role != 'tool' %}{% continue %}{% endif %}x{% endfor %}", ""),
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}c", "abc"),
        ("{{ unknown }}{{ bos_token }}{{ pad_token }}{{ think }}", "<s>yes"),
        ("{% if tools is none and not documents %}\n   none\n{% endif %}\n", "   none\n"),
        ("{{ messages[0] | tojson(indent=1) }}", '{\n "role": "user",\n "content": "b"\n}'),
        ("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}", "2"),
    ],
)
def test_templates_find_what_they_expect(tmp_path: Path, template: str, expected: str) -> None:
    make_tokenizer(tmp_path, template=template)
    messages = [user("b"), {"role": "assistant", "content": "d"}]
    assert rendered(tmp_path, Chat(messages, template_kwargs={"think": "yes", "messages": []})) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate: ' + messages[0].content) }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages[9].content.x.y }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% include 'x' %}",
    ],
)
def test_a_template_that_refuses_is_an_error_without_the_text(tmp_path: Path, template: str) -> None:
    make_tokenizer(tmp_path, template=template)
    with pytest.raises(PromptRefusedError) as caught:
        tokens(tmp_path, Chat([user(SECRET)]))
    assert SECRET not in f"{caught.value.message} {caught.value.hint} {caught.value!r}"


PARTS = (
    "{% set all = messages[0:] %}{% for m in all %}"
    "{% for p in m.content | list %}[{{ p.text }}]{% endfor %}{% endfor %}"
)


def test_content_has_the_form_that_the_template_walks_through(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"text": "c"}]
    make_tokenizer(tmp_path / "parts", template=PARTS)
    make_tokenizer(tmp_path / "string", template="{% for m in messages %}({{ m['content'] }}){% endfor %}")
    for content, as_parts, as_string in (("a", "[a]", "(a)"), (parts, "[a][b][c]", "(a\nb\nc)"), (None, "", "()")):
        assert rendered(tmp_path / "parts", Chat([user(content)])) == as_parts
        assert rendered(tmp_path / "string", Chat([user(content)])) == as_string


def test_messages_are_shown_as_engines_show_them(tmp_path: Path) -> None:
    make_tokenizer(tmp_path, template="{{ messages | tojson }}")
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": given}}
        for given in ('{"a": 1}', "[", None)
    ]
    messages = [
        user("x", name="me", other=1),
        {"role": "assistant", "content": None, "tool_calls": calls, "reasoning": "why", "refusal": None},
        {"role": "assistant", "content": "y", "tool_calls": []},
        {"role": "tool", "content": [{"type": "text", "text": "z"}], "tool_call_id": "1"},
    ]
    shown = json.loads(rendered(tmp_path, Chat(messages)))
    assert shown[0] == user("x", name="me")
    assert [call["function"]["arguments"] for call in shown[1].pop("tool_calls")] == [{"a": 1}, {}, {}]
    assert shown[1:] == [
        {"role": "assistant", "content": "", "reasoning": "why", "reasoning_content": "why"},
        {"role": "assistant", "content": "y"},
        {"role": "tool", "content": "z", "tool_call_id": "1"},
    ]
    assert calls[0]["function"]["arguments"] == '{"a": 1}'  # type: ignore[index]


@pytest.mark.parametrize(("last", "end"), [("the quick", "the quick"), (" the quick \n", "the quick \n"), ("", None)])
def test_a_final_message_that_goes_on_stays_open(tmp_path: Path, last: str, end: str | None) -> None:
    make_tokenizer(tmp_path)
    messages = [user("the quick"), {"role": "assistant", "content": last}]
    chat = Chat(messages, add_generation_prompt=False, continue_final_message=True)
    if end is None:
        with pytest.raises(PromptRefusedError, match="continued"):
            rendered(tmp_path, chat)
        return
    assert (
        rendered(tmp_path, chat) == "<s>user the quick</s>assistant " + last[: len(last) - len(last.lstrip())] + end
    )


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{}],
        [{"role": 1, "content": SECRET}],
        [user(7)],
        [user({"text": SECRET})],
        [user([{"type": "image_url", "image_url": {"url": SECRET}}])],
        [user([{"type": "text"}])],
        [user([7])],
        [{"role": "assistant", "tool_calls": SECRET}],
        [{"role": "assistant", "tool_calls": [SECRET]}],
        [user("\ud800" + SECRET)],
    ],
)
def test_messages_that_are_none_are_refused_without_repeating_them(tmp_path: Path, messages: Any) -> None:
    make_tokenizer(tmp_path)
    with pytest.raises(PromptRefusedError) as caught:
        tokens(tmp_path, Chat(messages))
    assert SECRET not in f"{caught.value.message} {caught.value.hint}"


# What can't be used


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("tokenizer.json", None, "a directory with tokenizer.json"),
        ("tokenizer.json", b"{}", "can read"),
        ("tokenizer.json", b"\xff", "UTF-8"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json as a map"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json as a map"),
        ("chat_template.jinja", b"{% if %}", "chat template that Jinja can read"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, file: str, content: bytes | None, expected: str) -> None:
    make_tokenizer(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UnusableTokenizerError) as caught:
        LocalTokenizer(tmp_path)
    assert expected in caught.value.expected


def test_a_chosen_template_must_be_there(tmp_path: Path) -> None:
    make_tokenizer(tmp_path)
    with pytest.raises(UnusableTokenizerError, match="chat_template"):
        LocalTokenizer(tmp_path, tmp_path / "none.jinja")


@pytest.mark.parametrize("package", ["tokenizers", "jinja2"])
def test_a_missing_package_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    make_tokenizer(tmp_path)
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name == package:
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UnusableTokenizerError, match=rf"{package}: pip install 'kvindexer\[tokenizers\]'"):
        LocalTokenizer(tmp_path)
