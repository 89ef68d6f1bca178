"""The web demo under the name that GeoChat's own repository gives it.

    python geochat_demo.py --model-path M [--load-8bit | --load-4bit] [--conv-mode NAME] [--device DEVICE]

It is `python -m geochat.serve.gradio_web_server`, with all its options.
"""

import sys

from geochat.serve.gradio_web_server import main

if __name__ == "__main__":
    sys.exit(main())
