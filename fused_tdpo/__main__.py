"""`python -m fused_tdpo` is `fused-tdpo`."""

from fused_tdpo.cli import main

if __name__ == "__main__":
    main()
