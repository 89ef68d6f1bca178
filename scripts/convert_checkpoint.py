"""Convert a checkpoint: --source X --target Y --format hf|llava [--dtype …] [--model-base …] [--vision-tower …]."""

from geochat.model.convert import main

if __name__ == "__main__":
    raise SystemExit(main())
