"""How the report writes attacks, radii, shares and times."""

from __future__ import annotations

import re

_ATTACKS = {"pgd": "PGD", "apgd": "APGD", "autoattack": "AutoAttack", "none": "none"}


def attack_name(attack: str) -> str:
    """pgd20 as PGD-20, autoattack as AutoAttack; others as they are."""
    found = re.fullmatch(r"([a-z]+)(\d*)", attack)
    if found is None or found[1] not in _ATTACKS:
        return attack
    return _ATTACKS[found[1]] + (f"-{found[2]}" if found[2] else "")


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
