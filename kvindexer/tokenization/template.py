"""Chat templates: messages -> the text that the model was trained on, as Hugging Face's library and vLLM render it.

A template is a Jinja program that comes with the model.  It runs in a sandbox that can change nothing, with the
functions that such templates expect: `raise_exception`, `strftime_now`, the filter `tojson`, the tags `break`,
`continue` and `generation`.

Before that the messages are brought into the form that engines give to templates: content as a string, or as a list
of parts if the template walks through parts; arguments of tool calls as maps; only fields that are known.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kvindexer.errors import PromptRefusedError
from kvindexer.tokenization.tokenizer import TEXT_PARTS, Chat, Message, part_type

DEFAULT: Final = "default"
FOR_TOOLS: Final = "tool_use"
_RESERVED: Final = frozenset({"messages", "tools", "chat_template", "tokenize"})


class _Generation(Extension):
    """`{% generation %}` marks what the model said, for training; here it only lets its body through."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 - templates pass it by position or name
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """JSON as it is; Jinja's own filter escapes characters of HTML, which models never saw."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)  # noqa: DTZ005 - engines tell models the local date


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


class ChatTemplate:
    """A model's templates by name, mostly just one; `special_tokens` are `bos_token` and the like.

    Raises jinja2.TemplateError for a template that is none.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        self._templates = {name: environment.from_string(source) for name, source in sources.items()}
        self._walks_parts = {name: walks_parts(environment.parse(source)) for name, source in sources.items()}
        self._special_tokens = special_tokens

    def render(self, chat: Chat) -> str:
        """The conversation as one text.  Raises PromptRefusedError."""
        name = self._choose(chat)
        conversation = _conversation(chat.messages, as_parts=self._walks_parts[name])
        given = {key: value for key, value in (chat.template_kwargs or {}).items() if key not in _RESERVED}
        try:
            text = self._templates[name].render(
                **{
                    **self._special_tokens,
                    "documents": None,
                    "add_generation_prompt": chat.add_generation_prompt,
                    **given,
                    "messages": conversation,
                    "tools": [_tool(tool) for tool in chat.tools] if chat.tools else None,
                }
            )
        except Exception:  # noqa: BLE001 - a template may raise anything, with pieces of the messages in it
            raise PromptRefusedError("the model's chat template refuses these messages") from None
        return _cut_open(text, conversation[-1]) if chat.continue_final_message else text

    def _choose(self, chat: Chat) -> str:
        if chat.tools and FOR_TOOLS in self._templates:
            return FOR_TOOLS
        if DEFAULT in self._templates:
            return DEFAULT
        raise PromptRefusedError("the model has no chat template", "set chat_template of this model's tokenizer")


def walks_parts(template: nodes.Template) -> bool:
    """Whether a template loops over the content of a message, and so wants it as a list of parts."""
    lists = {"messages"}
    assigned = [(_variable(node.target), _variable(_bare(node.node))) for node in template.find_all(nodes.Assign)]
    while more := {name for name, value in assigned if value in lists and name is not None} - lists:
        lists |= more  # names of names
    loops = list(template.find_all(nodes.For))
    messages = {_variable(loop.target) for loop in loops if _variable(_bare(loop.iter)) in lists} - {None}
    return any(_owner_of_content(_bare(loop.iter)) in messages for loop in loops)


def _bare(node: nodes.Node) -> nodes.Node:
    """An expression without filters, tests and slices around it."""
    while True:
        match node:
            case nodes.Filter(node=nodes.Node() as inner) | nodes.Test(node=inner):
                node = inner
            case nodes.Getitem(node=inner, arg=nodes.Slice()):
                node = inner
            case _:
                return node


def _variable(node: nodes.Node) -> str | None:
    return node.name if isinstance(node, nodes.Name) else None


def _owner_of_content(node: nodes.Node) -> str | None:
    match node:
        case nodes.Getitem(node=owner, arg=nodes.Const(value="content")) | nodes.Getattr(node=owner, attr="content"):
            return _variable(owner)
    return None


def _conversation(messages: Sequence[Message], *, as_parts: bool) -> list[Message]:
    if not messages:
        raise PromptRefusedError("there are no messages")
    return [_message(message, as_parts=as_parts) for message in messages]


def _message(message: Message, *, as_parts: bool) -> Message:
    role = message.get("role")
    if not isinstance(role, str):
        raise PromptRefusedError("messages: each needs a role")
    texts = _texts(message.get("content"))
    shown: Message = {"role": role}
    if as_parts and role != "tool":
        shown["content"] = [{"type": "text", "text": text} for text in texts]
    else:
        shown["content"] = "\n".join(texts)
    reasoning = message.get("reasoning")
    match role:
        case "assistant":
            if message.get("tool_calls"):
                shown["tool_calls"] = _tool_calls(message["tool_calls"])
            if reasoning is not None:
                shown |= {"reasoning": reasoning, "reasoning_content": reasoning}
        case "tool" if "tool_call_id" in message:
            shown["tool_call_id"] = message["tool_call_id"]
        case "developer":
            shown["tools"] = message.get("tools")
    if isinstance(message.get("name"), str):
        shown["name"] = message["name"]
    return shown


def _texts(content: object) -> list[str]:
    match content:
        case None:
            return []
        case str():
            return [content]
        case list():
            return [_text_of(part) for part in content]
    raise PromptRefusedError("messages: content is neither a string nor a list of parts")


def _text_of(part: object) -> str:
    kind = part_type(part)
    if kind not in TEXT_PARTS:
        raise PromptRefusedError(
            "messages: a part is no text, and a local tokenizer knows nothing else",
            "name engines instead of a path in the setting tokenizers, or send tokens and multimodal",
        )
    text = part if isinstance(part, str) else part.get("text", part.get(kind)) if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise PromptRefusedError("messages: a part has no text")
    return text


def _tool_calls(calls: object) -> list[Any]:
    """Calls with their arguments as maps: callers send them as a string of JSON, templates expect a map."""
    if not isinstance(calls, list):
        raise PromptRefusedError("messages: tool_calls is no list")
    shown = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict):
            raise PromptRefusedError("messages: a tool call has no function")
        shown.append({**call, "function": {**function, "arguments": _arguments(function.get("arguments"))}})
    return shown


def _arguments(given: object) -> dict[str, Any]:
    """What can't be read becomes an empty map, as in vLLM, or a conversation could never go on."""
    try:
        read = json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError):
        return {}
    return read if isinstance(read, dict) else {}


def _tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A tool with its fields in the order, and with the defaults, in which vLLM hands it to the template."""
    function = tool.get("function")
    if not isinstance(function, dict):
        raise PromptRefusedError("tools: each needs a function")
    return {
        "type": "function",
        **_in_order(tool, ("type",)),
        "function": {
            "name": None,
            "description": None,
            "parameters": None,
            **_in_order(function, ("name", "description", "parameters")),
        },
    }


def _in_order(values: Mapping[str, Any], first: Iterable[str]) -> dict[str, Any]:
    return {name: values[name] for name in (*first, *values) if name in values}


def _cut_open(text: str, last: Message) -> str:
    """The text up to the end of the last message's content, so that the model goes on with it."""
    content = (
        last["content"] if isinstance(last["content"], str) else "".join(p["text"] for p in last["content"][-1:])
    )
    bare = content.strip()
    at = text.rfind(bare) if bare else -1
    if at < 0:
        raise PromptRefusedError("the chat template does not show the message that is to be continued")
    whole = content.lstrip()
    return text[: at + len(whole if text.startswith(whole, at) else bare)]
