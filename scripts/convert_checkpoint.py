"""Convert a checkpoint: --source X --target Y --format hf|llava|gguf|peft|gguf; --help lists the rest."""

from geochat.model.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
