"""Check installed versions of modules without importing them."""

from __future__ import annotations

import re
from importlib import metadata

# Distributions that provide a module, if not only the one with the module's name.
_PROVIDERS = {"onnxruntime": ("onnxruntime", "onnxruntime-gpu")}

_VERSION = re.compile(
    r"""v?(?P<release>\d+(?:\.\d+)*)
    (?:[-_.]?(?P<pre>a|b|rc)[-_.]?(?P<pre_n>\d*))?
    (?:\.post(?P<post>\d+))?
    (?:\.dev(?P<dev>\d+))?
    (?:\+[a-z0-9.]+)?""",
    re.VERBOSE | re.IGNORECASE,
)
_CLAUSE = re.compile(r"\s*(>=|<=|==|!=|>|<)\s*(\S+)\s*")

# Sort key of a version: release without trailing zeros, then pre-release, post-release and dev-release.
_Key = tuple[tuple[int, ...], tuple[int, int], int, int]
_DEV_ONLY, _FINAL = (-1, 0), (9, 0)
_NO_POST, _NO_DEV = -1, 1 << 62


def installed(module: str) -> str | None:
    """Installed version of the distribution that provides `module`, or None."""
    for name in _PROVIDERS.get(module, (module,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def fits(version: str, wanted: str) -> bool:
    """Return True if `version` is in a comma-separated range such as `>=1.30,<2`.

    Versions are ordered as in PEP 440: 2.0rc1 comes before 2.0, but `<2` excludes it. Local version parts, after a
    plus, are ignored.

    Raises:
        ValueError: the version or the range has invalid syntax.
    """
    return all(_satisfies(version, clause) for clause in wanted.split(","))


def _satisfies(version: str, clause: str) -> bool:
    match = _CLAUSE.fullmatch(clause)
    if match is None:
        raise ValueError(f"{clause!r} is not a version range")
    sign, (has, limit) = match[1], (_key(version), _key(match[2]))
    if sign == "<":
        # `<2` excludes pre-releases of 2 itself.
        return has < limit and not (has[0] == limit[0] and _is_prerelease(has) and not _is_prerelease(limit))
    if sign == ">":
        # `>2` excludes post-releases of 2 itself.
        return has > limit and not (has[:2] == limit[:2] and has[2] != _NO_POST and limit[2] == _NO_POST)
    return {">=": has >= limit, "<=": has <= limit, "==": has == limit, "!=": has != limit}[sign]


def _is_prerelease(key: _Key) -> bool:
    return key[1] != _FINAL or key[3] != _NO_DEV


def _key(version: str) -> _Key:
    match = _VERSION.fullmatch(version.strip())
    if match is None:
        raise ValueError(f"{version!r} is not a version")
    release = [int(part) for part in match["release"].split(".")]
    while len(release) > 1 and release[-1] == 0:
        release.pop()
    post = int(match["post"]) if match["post"] else _NO_POST
    dev = int(match["dev"]) if match["dev"] else _NO_DEV
    if match["pre"]:
        pre = ("a", "b", "rc").index(match["pre"].lower()), int(match["pre_n"] or 0)
    else:
        pre = _DEV_ONLY if match["dev"] and not match["post"] else _FINAL
    return tuple(release), pre, post, dev
