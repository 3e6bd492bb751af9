"""``./dev demo``: a whole cluster on this machine, checked step by step."""

from __future__ import annotations

from lab.interrupts import ending_quietly

if __name__ == "__main__":
    with ending_quietly():
        from demo.commands import main
    main(prog_name="./dev demo")
