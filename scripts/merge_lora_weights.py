"""Merge an adapter folder into its base: --model-path ADAPTER [--model-base BASE] --save-model-path OUT."""

from geochat.model.merge import main

if __name__ == "__main__":
    raise SystemExit(main())
