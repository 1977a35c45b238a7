"""A tokenizer of our own: the `tokenizer.json` and the chat template that lie in a model's directory.

    tokenizer.json             text -> tokens, by Hugging Face's `tokenizers`
    tokenizer_config.json      special tokens, whether a prompt begins with one, perhaps the chat template
    chat_template.jinja        the chat template, before that in tokenizer_config.json; or chat_template.json
    additional_chat_templates/*.jinja   further templates by name, `tool_use` for chats with tools

Everything is read once, at start.  Texts are worked on in a few threads of their own.  The library lets go of the
interpreter in its calls for batches only, so a text is a batch of one: queries go on meanwhile.
"""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvindexer.errors import KvIndexerError, PromptRefusedError
from kvindexer.tokenization.blocks import pack_tokens
from kvindexer.tokenization.tokenizer import Chat, Completion, Text, Tokenized

if TYPE_CHECKING:
    import tokenizers

    from kvindexer.tokenization.template import ChatTemplate

TOKENIZER: Final = "tokenizer.json"
CONFIG: Final = "tokenizer_config.json"
TEMPLATE: Final = "chat_template.jinja"
OLD_TEMPLATE: Final = "chat_template.json"
FURTHER_TEMPLATES: Final = "additional_chat_templates"
SPECIAL_TOKENS: Final = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_MAX_FILE_BYTES: Final = 256 * 1024 * 1024
_PROBE: Final = "a"


class UnusableTokenizerError(KvIndexerError):
    """What lies there is no tokenizer; `expected` says what should."""

    def __init__(self, expected: str) -> None:
        self.expected = expected
        super().__init__(expected)


class LocalTokenizer:
    """A tokenizer and its chat template, in memory."""

    def __init__(self, directory: Path, chat_template: Path | None = None, *, threads: int = 1) -> None:
        """Read the files.  Raises UnusableTokenizerError."""
        if directory.name == TOKENIZER:
            directory = directory.parent
        self._tokenizer = _load(directory / TOKENIZER)
        config = _json(directory / CONFIG)
        self._special_tokens = {name: text for name in SPECIAL_TOKENS if (text := _token(config.get(name)))}
        self._first = self._beginning(config.get("add_bos_token"))
        self._template = _template(directory, config, chat_template, self._special_tokens)
        self._executor = ThreadPoolExecutor(threads, "kvindexer-tokenizer")

    async def tokenize(self, text: Text) -> Tokenized:
        """See `Tokenizer.tokenize`."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, self._tokenize, text)

    async def close(self) -> None:
        """See `Tokenizer.close`.  A text that is being worked on can't be stopped; nobody waits for it."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _tokenize(self, text: Text) -> Tokenized:
        match text:
            case Completion(text=plain, add_special_tokens=special):
                pass
            case Chat(add_special_tokens=special) as chat:
                plain = self._template.render(chat)
        try:
            (encoded,) = self._tokenizer.encode_batch_fast([plain], add_special_tokens=special)
        except (TypeError, UnicodeEncodeError):  # what the library says of text that can't be UTF-8
            raise PromptRefusedError("the text is no Unicode: it has half a surrogate pair") from None
        ids = encoded.ids
        if special and self._first is not None:
            token, present = self._first
            ids = ids[1:] if present else [token, *ids]
        return Tokenized(pack_tokens(ids))

    def _beginning(self, wanted: object) -> tuple[int, bool] | None:
        """What to do about a prompt's first token: (token, whether the file adds it), None if file and config agree.

        Engines follow `add_bos_token` of the configuration where tokenizer.json says something else.
        """
        token = self._tokenizer.token_to_id(self._special_tokens.get("bos_token", ""))
        if token is None or not isinstance(wanted, bool):
            return None
        plain = self._tokenizer.encode(_PROBE, add_special_tokens=False).ids
        present = self._tokenizer.encode(_PROBE).ids[:1] == [token] != plain[:1]
        return None if present == wanted else (token, present)


def _load(file: Path) -> tokenizers.Tokenizer:
    try:
        import tokenizers  # noqa: PLC0415 - an extra; without it everything else works
    except ImportError:
        raise UnusableTokenizerError("the package tokenizers: pip install 'kvindexer[tokenizers]'") from None
    content = _read(file)
    if content is None:
        raise UnusableTokenizerError(f"a directory with {TOKENIZER}")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception:  # noqa: BLE001 - the library raises plain Exception
        raise UnusableTokenizerError(f"a directory whose {TOKENIZER} the package tokenizers can read") from None
    tokenizer.no_truncation()  # what a training run left in the file is no part of the model
    tokenizer.no_padding()
    return tokenizer


def _template(
    directory: Path, config: dict[str, Any], chosen: Path | None, special_tokens: dict[str, str]
) -> ChatTemplate:
    try:
        from jinja2 import TemplateError  # noqa: PLC0415 - an extra, as above

        from kvindexer.tokenization.template import DEFAULT, ChatTemplate  # noqa: PLC0415 - it needs Jinja
    except ImportError:
        raise UnusableTokenizerError("the package jinja2: pip install 'kvindexer[tokenizers]'") from None
    sources = _sources(config.get("chat_template"), DEFAULT)
    old = _json(directory / OLD_TEMPLATE).get("chat_template")
    sources |= _sources(old, DEFAULT)
    for file in sorted((directory / FURTHER_TEMPLATES).glob("*.jinja")):
        sources[file.stem] = _read(file) or ""
    newest = _read(directory / TEMPLATE)
    if newest is not None:
        sources[DEFAULT] = newest
    if chosen is not None:
        content = _read(chosen)
        if content is None:
            raise UnusableTokenizerError("a chat_template that can be read")
        sources = {DEFAULT: content}
    try:
        return ChatTemplate(sources, special_tokens)
    except (TemplateError, RecursionError):
        raise UnusableTokenizerError("a chat template that Jinja can read") from None


def _sources(given: object, default: str) -> dict[str, str]:
    """Templates by name: a configuration has one as text, or several as a list of maps."""
    match given:
        case str():
            return {default: given}
        case list():
            pairs = [(item.get("name"), item.get("template")) for item in given if isinstance(item, dict)]
            return {name: text for name, text in pairs if isinstance(name, str) and isinstance(text, str)}
    return {}


def _token(given: object) -> str:
    """A special token, which is text or a map with the text in it."""
    text = given.get("content") if isinstance(given, dict) else given
    return text if isinstance(text, str) else ""


def _json(file: Path) -> dict[str, Any]:
    content = _read(file)
    try:
        read = json.loads(content) if content is not None else {}
    except (ValueError, RecursionError):
        read = None
    if not isinstance(read, dict):
        raise UnusableTokenizerError(f"{file.name} as a map of JSON")
    return read


def _read(file: Path) -> str | None:
    """A file's text, None if it isn't there."""
    try:
        with file.open("rb") as opened:
            content = opened.read(_MAX_FILE_BYTES + 1)
        if len(content) > _MAX_FILE_BYTES:
            raise UnusableTokenizerError(f"{file.name} of at most {_MAX_FILE_BYTES} bytes")
        return content.decode()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UnusableTokenizerError(f"{file.name} as a readable file ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UnusableTokenizerError(f"{file.name} as UTF-8") from None
