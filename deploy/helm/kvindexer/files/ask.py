"""What `helm test` runs: the service becomes ready, and answers a question.  Needs the standard library alone.

Variables: READY_URL; URL, and TOKEN_FILE and CA_FILE if there are any.  Without URL nothing is asked: callers need a
token or a certificate, and this one has none.
"""

import json
import os
import ssl
import sys
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

PATIENCE_S = 60
TIMEOUT_S = 5
NOT_FOUND = 404


def wait_until_ready(url: str) -> None:
    """End the test if it takes too long."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            with urlopen(url, timeout=TIMEOUT_S):
                print(f"{url}: ready")
                return
        except (URLError, OSError) as error:
            if time.monotonic() > deadline:
                sys.exit(f"{url}: not ready within {PATIENCE_S} s: {error}")
        time.sleep(1)


def ask(url: str, token_file: str | None, ca_file: str | None) -> None:
    """One question about a model that nobody serves: to be told so is an answer, too."""
    headers = {"content-type": "application/json"}
    if token_file:
        headers["authorization"] = f"Bearer {Path(token_file).read_text().strip()}"
    body = json.dumps({"model": "helm-test", "tokens": list(range(16))}).encode()
    context = ssl.create_default_context(cafile=ca_file) if url.startswith("https:") else None
    try:
        with urlopen(Request(url, body, headers), timeout=TIMEOUT_S, context=context) as response:
            print(f"{url}: {response.status}")
    except HTTPError as error:
        text = error.read().decode(errors="replace")
        if error.code != NOT_FOUND or '"unknown_model"' not in text:
            sys.exit(f"{url}: {error.code} {text}")
        print(f"{url}: answers (no engine serves the model of this test)")
    except (URLError, OSError) as error:
        sys.exit(f"{url}: {error}")


wait_until_ready(os.environ["READY_URL"])
if os.environ.get("URL"):
    ask(os.environ["URL"], os.environ.get("TOKEN_FILE"), os.environ.get("CA_FILE"))
