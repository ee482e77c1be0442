"""What others have published, word for word close to the source. None of it was measured here: other machines, other
loads, other baselines."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Published:
    system: str
    figure: str
    workload: str
    source: str


PUBLISHED = (
    Published(
        "Cilium, L7 NetworkPolicy",
        "some 86-89 % fewer requests/s than without; layer-3/4 policy without overhead",
        "fortio, HTTP, saturated, TKE clusters (VPC-CNI with kube-proxy, Cilium native routing, Cilium overlay)",
        "https://imroc.cc/tke/en/networking/cilium/appendix/network-benchmark",
    ),
    Published(
        "Istio 1.13.4, sidecar",
        "0.35 vCPU and 40 MB a proxy for each 1,000 requests/s; +2.65 ms at the 90th percentile",
        "Istio load tests: 1,000 services, 2,000 sidecars, 70,000 requests/s in the mesh",
        "https://istio.io/v1.13/docs/ops/deployment/performance-and-scalability/",
    ),
    Published(
        "Istio 1.12.3, two sidecars (Alauda Service Mesh documentation)",
        "0.5 vCPU a proxy for each 1,000 requests/s; +1.7 ms at the 90th, +2.7 ms at the 99th percentile",
        "not said in the source",
        "https://docs.alauda.io/servicemesh/4.0/performance.html",
    ),
    Published(
        "NeuVector, learning mode",
        "no vendor's figure was found; a user reports a longest response above 500 ms with the enforcer",
        "http_load, Kubernetes 1.16; the maintainers do not confirm it",
        "https://github.com/neuvector/neuvector/issues/141",
    ),
)
