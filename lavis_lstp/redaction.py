"""Texts as others may see them: without secrets, and without what would act on a terminal.

In: addresses, commands, messages and settings, on their way into a manifest, a log or an error. Out: the same texts
with `***` for user and password of an address, for tokens and signatures in its query, and for keys of the well-known
forms. What a text says otherwise stays: a run must be repeatable from its manifest by whoever has the keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

CUT = "***"

_NAMES = (
    r"x-(?:amz|goog|ms)-[\w-]+|[\w.-]*(?:token(?!i[sz])|signature|secret|passw(?:or)?d|credential|api[_-]?key|access[_-]?key)[\w.-]*"
    r"|sig|key|pwd|auth|policy|key-pair-id|googleaccessid"
)
KEYS = {
    "OpenAI key": r"sk-(?:proj-|svcacct-|admin-|ant-)?[A-Za-z0-9_-]{16,}",
    "Hugging Face token": r"hf_[A-Za-z0-9]{20,}",
    "Weights & Biases key": r"(?<=WANDB_API_KEY=)[0-9a-f]{40}",
    "Google API key": r"AIza[0-9A-Za-z_-]{35}",
}
"""Kinds of keys this package meets that `detect-secrets` 1.5 does not know, or knows in their old form alone."""

_ADDRESS_USER = re.compile(r"([a-z][a-z0-9+.-]*://)[^/?#\s'\"<>]*@", re.IGNORECASE)
_QUERY = re.compile(rf"([?&;](?:{_NAMES})=)[^&\s'\"#;<>]+", re.IGNORECASE)
_HEADER = re.compile(
    r"((?:authorization|x-api-key|cookie)['\"]?\s*[:=]\s*['\"]?(?:bearer |basic )?)[^\s'\"]+", re.IGNORECASE
)
_BEARER = re.compile(r"(\bbearer )[\w.~+/=-]{8,}", re.IGNORECASE)
_OPTION = re.compile(
    r"((?:^|\s|[\w.-])(?:password|passwd|secret|api[_-]?key|(?:access|auth|session)[_-]?token|secret[_-]?access[_-]?key)"
    r"=)[^\s'\"&]+",
    re.IGNORECASE,
)
_KEY = re.compile(r"\b(?:" + "|".join(f"(?:{form})" for form in KEYS.values()) + ")")
_SECRET_SETTING = re.compile(r"(?:^|_)(?:api_?key|passw(?:or)?d|secret|(?:access|auth|session)_?token)$", re.IGNORECASE)


def without_secrets(text: str) -> str:
    """The text with `***` in place of what would let a reader in.

    >>> without_secrets("https://me:word@host/x.tar?X-Amz-Signature=12&part=1")
    'https://***@host/x.tar?X-Amz-Signature=***&part=1'
    """
    if "://" in text:
        text = _ADDRESS_USER.sub(rf"\1{CUT}@", text)
    if "=" in text:
        text = _QUERY.sub(rf"\1{CUT}", text)
    for pattern in (_HEADER, _BEARER, _OPTION):
        text = pattern.sub(rf"\1{CUT}", text)
    return _KEY.sub(CUT, text)


def without_secrets_in(value: Any) -> Any:
    """Plain containers with every text in them without secrets, and `***` for settings that are one by their name."""
    if isinstance(value, Mapping):
        return {
            key: CUT if isinstance(one, str) and one and _SECRET_SETTING.search(str(key)) else without_secrets_in(one)
            for key, one in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets_in(one) for one in value]
    return without_secrets(value) if isinstance(value, str) else value


def recordable(config: Any, resolved: Iterable[str] = ()) -> Any:
    """A configuration as manifests and logs have it: plain containers, and no secret in them.

    References between settings are resolved; what comes out of the environment or from another resolver,
    `${oc.env:NAME}`, stays as it is written, because a manifest travels with the weights.

    Args:
        config: a tree of OmegaConf, or plain containers.
        resolved: dotted names of settings that are recorded as they were used in any case.
    """
    from omegaconf import DictConfig, OmegaConf

    if not isinstance(config, DictConfig):
        return without_secrets_in(config)
    kept = OmegaConf.create(_held_back(OmegaConf.to_container(config, resolve=False)))
    for name in resolved:
        if OmegaConf.select(config, name) is not None:
            OmegaConf.update(kept, name, OmegaConf.select(config, name))
    return without_secrets_in(_held_back(OmegaConf.to_container(kept, resolve=True), back=True))


_RESOLVER = re.compile(r"\$\{[^{}]*:|\$\{[^{}]*\$\{")
_HELD = "$\0{"


def _held_back(value: Any, back: bool = False) -> Any:
    """Plain containers with the interpolations of resolvers out of OmegaConf's sight, or as they were."""
    if isinstance(value, Mapping):
        return {key: _held_back(one, back) for key, one in value.items()}
    if isinstance(value, list):
        return [_held_back(one, back) for one in value]
    if not isinstance(value, str):
        return value
    if back:
        return value.replace(_HELD, "${")
    return value.replace("${", _HELD) if _RESOLVER.search(value) else value


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")


def printable(text: str) -> str:
    """The text as a terminal may see it: no escape, control or direction character, but line ends and tabs.

    >>> printable("red: \\x1b[31m")
    'red: \\\\x1b[31m'
    """
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
