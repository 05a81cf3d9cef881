"""Asks a server for a completion, and prints each token's id when it comes.

Runs in a machine, with Python's own modules alone, because importing the official client takes a minute there.

    python -m tests.rdma.ask URL MODEL PROMPT TOKENS
"""

from __future__ import annotations

import json
import sys
import urllib.request


def main() -> None:
    """Prints `token N` for each token of the stream, and `finish REASON` at its end."""
    url, model, prompt, tokens = sys.argv[1:]
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": int(tokens),
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=600) as response:
        for line in response:
            data = line.decode().strip().removeprefix("data: ")
            if not data or data == "[DONE]":
                continue
            chunk = json.loads(data)
            if "choices" not in chunk:
                print("error", data, flush=True)
                continue
            for choice in chunk["choices"]:
                for token in choice.get("token_ids") or []:
                    print("token", token, flush=True)
                if choice.get("finish_reason"):
                    print("finish", choice["finish_reason"], flush=True)


if __name__ == "__main__":
    main()
