"""The string formats that are enforced, as regular expressions of whole strings.

Each describes a part of the format (most often all that anyone writes), so that what is generated
is valid for every validator: no leap seconds, no year 0, no IPv6 zones, no `xn--` labels.
"""

from __future__ import annotations

from typing import NamedTuple


class Format(NamedTuple):
    pattern: str
    max_length: int | None = None


_YEAR = "(?:[0-9]{3}[1-9]|[0-9]{2}[1-9]0|[0-9][1-9]00|[1-9]000)"
_LEAP_YEAR = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    f"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])"
    "|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    f"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
)
_CLOCK = "(?:[01][0-9]|2[0-3]):[0-5][0-9]"
_TIME = rf"{_CLOCK}:[0-5][0-9](?:\.[0-9]{{1,6}})?(?:Z|[+-]{_CLOCK})"
_DURATION_TIME = "T(?:[0-9]+H(?:[0-9]+M(?:[0-9]+S)?)?|[0-9]+M(?:[0-9]+S)?|[0-9]+S)"
_DURATION_DATE = "(?:[0-9]+Y(?:[0-9]+M(?:[0-9]+D)?)?|[0-9]+M(?:[0-9]+D)?|[0-9]+D)"

_LABEL = "[a-zA-Z0-9](?:-?[a-zA-Z0-9]){0,31}"
_HOSTNAME = rf"{_LABEL}(?:\.{_LABEL})*"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
_IPV4 = rf"(?:{_BYTE}\.){{3}}{_BYTE}"
_GROUP = "[0-9a-fA-F]{1,4}"
_IPV6 = "(?:{})".format(
    "|".join(
        [
            f"(?:{_GROUP}:){{7}}{_GROUP}",
            f"(?:{_GROUP}:){{1,7}}:",
            *(f"(?:{_GROUP}:){{1,{7 - n}}}(?::{_GROUP}){{1,{n}}}" for n in range(1, 7)),
            f":(?::{_GROUP}){{1,7}}",
            "::",
        ]
    )
)

_ATEXT = "[a-zA-Z0-9!#$%&'*+/=?^_`{|}~-]"
_EMAIL = rf"{_ATEXT}+(?:\.{_ATEXT}+)*@{_LABEL}(?:\.{_LABEL})+"

_PCHAR = "(?:[a-zA-Z0-9._~!$&'()*+,;=:@-]|%[0-9a-fA-F]{2})"
_AUTHORITY = f"{_HOSTNAME}(?::[0-9]{{1,4}})?"
_SUFFIX = rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_PATH = f"(?:/{_PCHAR}*)*"
_URI = rf"[a-zA-Z][a-zA-Z0-9+.-]*:(?://{_AUTHORITY}{_PATH}|{_PCHAR}+{_PATH}){_SUFFIX}"
_URI_REFERENCE = rf"(?:{_URI}|/(?:{_PCHAR}+{_PATH})?{_SUFFIX}|[a-zA-Z0-9._~-]+{_PATH}{_SUFFIX})"
_POINTER = "(?:/(?:[^/~]|~[01])*)*"

_H = "[0-9a-fA-F]"

ENFORCED: dict[str, Format] = {
    "date-time": Format(f"{_DATE}T{_TIME}"),
    "date": Format(_DATE),
    "time": Format(_TIME),
    "duration": Format(f"P(?:{_DURATION_DATE}(?:{_DURATION_TIME})?|{_DURATION_TIME}|[0-9]+W)"),
    "email": Format(_EMAIL, 254),
    "idn-email": Format(_EMAIL, 254),
    "hostname": Format(_HOSTNAME, 253),
    "idn-hostname": Format(_HOSTNAME, 253),
    "ipv4": Format(_IPV4),
    "ipv6": Format(_IPV6),
    "uuid": Format(f"{_H}{{8}}-{_H}{{4}}-{_H}{{4}}-{_H}{{4}}-{_H}{{12}}"),
    "uri": Format(_URI),
    "iri": Format(_URI),
    "uri-reference": Format(_URI_REFERENCE),
    "iri-reference": Format(_URI_REFERENCE),
    "json-pointer": Format(_POINTER),
    "relative-json-pointer": Format(f"(?:0|[1-9]{{1,3}})(?:#|{_POINTER})"),
}
"""By name (JSON schema 2020-12, Validation, 7.3)."""

UNSUPPORTED = frozenset({"regex", "uri-template"})
"""Formats of the standard that cannot be enforced. Any other name is an annotation."""
