"""``./dev lab``: fabrics of your own. See docs/lab.md."""

from __future__ import annotations

from lab.interrupts import ending_quietly

if __name__ == "__main__":
    with ending_quietly():
        from lab.commands import main
    main(prog_name="./dev lab")
