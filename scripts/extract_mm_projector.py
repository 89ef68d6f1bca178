"""Take the projector out of a model: `python scripts/extract_mm_projector.py --help`."""

from geochat.model.extract import main

if __name__ == "__main__":
    raise SystemExit(main())
