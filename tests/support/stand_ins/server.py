"""Stand-in for `glmd serve`: serves `/health` until SIGTERM, or fails at once."""

from __future__ import annotations

import http.server
import json
import os
import signal
import sys

if "GLMD_FAIL" in os.environ:
    sys.exit("glmd: model.safetensors is damaged.")


class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = {"status": "ready", "model": " ".join(sys.argv[1:]), "restarts": 0}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None:
        print("asked", flush=True)


signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
http.server.HTTPServer(("127.0.0.1", 0), Health).serve_forever()
