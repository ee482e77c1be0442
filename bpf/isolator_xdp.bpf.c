// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
/*
 * XDP: drops what flows4 already says is dropped before an skb is made, forwards what it allows where both
 * ends keep checksums through a redirect, and hands the rest to tc, which decides from the same maps.
 */
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_endian.h>
#include "isolator.h"
#include "isolator_maps.h"
#include "isolator_packet.h"
#include "isolator_flow4.h"

static __always_inline int classify(struct xdp_md *ctx)
{
	void *data = (void *)(long)ctx->data, *end = (void *)(long)ctx->data_end;
	__u32 ifindex = ctx->ingress_ifindex;
	struct port *port = bpf_map_lookup_elem(&ports, &ifindex);
	struct control *control = the_control();
	struct packet p = {.length = bpf_xdp_get_buff_len(ctx)};
	struct flow_key key;
	struct flow4 *f;
	__u64 now = now_ns();
	int direction;

	/* what tc would refuse for its looks, tc refuses: it knows offloads and VLAN tags that XDP cannot see */
	if (!port || !control || read_packet(data, end, &p, 1) || p.kind != KIND_IP)
		return XDP_PASS;
	direction = port->side == SIDE_CONTAINER ? EGRESS : INGRESS;
	flow_key_of(&key, &p, port->endpoint, direction);
	f = bpf_map_lookup_elem(&flows4, &key);
	if (!f || !is_settled(f, &p, direction, control->generation, now))
		return XDP_PASS;
	if (f->verdict == VERDICT_DROP) {
		count_flow4(f, &p, direction, now);
		count_drop(f->reason, p.length);
		return XDP_DROP;
	}
	if (f->verdict == VERDICT_ALLOW && (port->flags & PORT_XDP_FORWARD) && direction == INGRESS &&
	    same_mac(((struct ethhdr *)data)->h_dest, port->mac)) {
		count_flow4(f, &p, direction, now);
		return bpf_redirect(port->peer_ifindex, 0);
	}
	return XDP_PASS;
}

SEC("xdp.frags")
int isolator_xdp(struct xdp_md *ctx)
{
	return classify(ctx);
}

/* As generic XDP a program for fragments would cost tc the Ethernet header: the skb made anew has no mac_len. */
SEC("xdp")
int isolator_xdp_generic(struct xdp_md *ctx)
{
	return classify(ctx);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
