"""A capture through policy and inspector, offline: no root, no kernel, no clock but the frames' own.

capture → endpoints it crosses → stand-in for the kernel ─┬─ layer 4: decided
                                                          └─ punt → Forwarder, Inspector → records
"""
