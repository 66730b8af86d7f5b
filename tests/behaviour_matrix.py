"""Prints the matrix of classes and behaviours that test_common_behaviour.py has checked."""

SIGNS = {"passed": "+", "failed": "FAILED", "error": "FAILED"}


def matrix_lines(stats: dict[str, list]) -> list[str]:
    """Return the matrix as text, from the reports of a test run by outcome; no lines without such tests."""
    cells, reasons = {}, {}
    for outcome in (*SIGNS, "skipped"):
        for report in stats.get(outcome, ()):
            own = dict(getattr(report, "user_properties", ())).get("matrix")
            if own is None:
                continue
            sign = SIGNS.get(outcome)
            if outcome == "skipped":
                reason = report.longrepr[2].removeprefix("Skipped: ")
                sign = reasons.setdefault(f"not applicable, because it {reason}", f"({len(reasons) + 1})")
            cells[tuple(own)] = sign
    classes, behaviours = (list(dict.fromkeys(key[index] for key in cells)) for index in (0, 1))
    if not cells:
        return []
    widths = [max(map(len, classes))] + [max(len(behaviour), 6) for behaviour in behaviours]
    rows = [["", *behaviours]]
    # A cell without a sign was not run, for example because it is slow.
    rows += [[name, *(cells.get((name, behaviour), "") for behaviour in behaviours)] for name in classes]
    lines = ["  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows]
    lines += ["", "+ passed; empty: not run, see `-m slow`"]
    return lines + [f"{sign} {reason}" for reason, sign in reasons.items()]
