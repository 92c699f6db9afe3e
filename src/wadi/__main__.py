"""``python -m wadi`` and ``accelerate launch -m wadi``."""

from wadi.cli import main

raise SystemExit(main())
