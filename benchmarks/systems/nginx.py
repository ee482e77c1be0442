"""nginx as a proxy: one worker, locations as rules."""

from __future__ import annotations

from pathlib import Path

from benchmarks.place import BULK, HTTP, UPLOAD, Place
from benchmarks.policy import METHODS, PREFIX_ALLOWED, UPLOAD_PATH, more_paths
from benchmarks.systems.base import absent
from benchmarks.systems.proxy import PLAIN, Proxy

STREAM = "/usr/lib/nginx/modules/ngx_stream_module.so"
CONFIG = f"""\
load_module {STREAM};
daemon off; worker_processes 1; pid FOLDER/nginx.pid; error_log FOLDER/error.log crit;
events {{ worker_connections 16000; }}
stream {{ server {{ listen {BULK}; proxy_pass {PLAIN}:{BULK}; }} }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 1h;
  client_body_temp_path FOLDER/body; proxy_temp_path FOLDER/proxy;
  fastcgi_temp_path FOLDER/fastcgi; uwsgi_temp_path FOLDER/uwsgi; scgi_temp_path FOLDER/scgi;
  proxy_http_version 1.1; proxy_set_header Connection ""; proxy_max_temp_file_size 0;
  upstream pages {{ server {PLAIN}:{HTTP}; keepalive 512; keepalive_requests 1000000000; }}
  upstream uploads {{ server {PLAIN}:{UPLOAD}; keepalive 16; keepalive_requests 1000000000; }}
  server {{
    listen {HTTP} backlog=4096;
LOCATIONS
  }}
  server {{
    listen {UPLOAD}; client_max_body_size 0; proxy_request_buffering off;
    location / {{ return 403; }}
    location = {UPLOAD_PATH} {{ limit_except POST {{ deny all; }} proxy_pass http://uploads; }}
  }}
}}
"""


class Nginx(Proxy):
    name = "nginx"
    commands, asks_version = ("nginx",), ("-v",)
    set_up = (
        "One worker, keep-alive to the server, logs off, bodies streamed unbuffered. Each allowed path is a location "
        "(nginx keeps them as a tree). Bulk through the stream module."
    )

    def missing(self) -> str:
        return absent(*self.commands) or (
            "" if Path(STREAM).exists() else "not installed: nginx's stream module"
        )

    def config(self, rules: int = 0, policy: bool = True, extra: bool = False) -> str:
        methods = " ".join(METHODS)
        only = f"limit_except {methods} {{ deny all; }} " if policy else ""
        locations = [f"    location / {{ {'return 403;' if policy else 'proxy_pass http://pages;'} }}"]
        for path in (PREFIX_ALLOWED, *more_paths(rules, extra)):
            locations.append(f"    location {path} {{ {only}proxy_pass http://pages; }}")
        return CONFIG.replace("LOCATIONS", "\n".join(locations))

    def command(self, folder: Path) -> tuple[str, ...]:
        return ("nginx", "-c", str(folder / "config"))

    def reload(self, place: Place, folder: Path) -> None:
        place.lab.inside(self.name, *self.command(folder), "-s", "reload")
