"""How the report writes attacks, radii, shares and times."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_ATTACKS = {"autoattack": "AutoAttack", "square": "Square"}


def attack_name(attack: str) -> str:
    """pgd20 as PGD-20, apgd-ce as APGD-CE, several with a plus between them; what isn't known stays as it is."""
    return " + ".join(_one_attack(name) for name in attack.split(","))


def _one_attack(name: str) -> str:
    found = re.fullmatch(r"(a?pgd|fab)-?(\d+|ce|t|)", name)
    if found is None:
        return _ATTACKS.get(name, name)
    return "-".join(part.upper() for part in found.groups() if part)


def evaluation_name(result: Mapping[str, Any]) -> str:
    """The attack of an evaluation, with all that makes it another one: starts, another net's, another branch's."""
    words = [attack_name(result["attack"])]
    if (result.get("restarts") or 1) > 1:
        words.append(f"{result['restarts']} starts")
    if result.get("transfer_from"):
        words.append("transferred")
    if result.get("branch", "adv") != "adv":
        words.append(f"{result['branch']} branch")
    return ", ".join(words)


def radius_name(norm: str, eps: float) -> str:
    """The ball, as in linf 8/255."""
    return f"{norm} {eps * 255:.4g}/255" if norm == "linf" else f"{norm} {eps:.4g}"


def share_name(share: float | None) -> str:
    """A share of 1 in percent; a dash for none."""
    return "\N{EN DASH}" if share is None else f"{share:.1%}"


def duration_name(seconds: float) -> str:
    """Seconds in the two largest units."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
