"""``python -m manxctl``."""

from manxctl.main import main

main(prog_name="manxctl")
