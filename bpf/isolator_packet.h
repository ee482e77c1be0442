/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0 */
/*
 * A frame's headers, read once, the same for tc and XDP. read_packet() is the only gate: what it
 * returns REASON_NONE for has a known EtherType, no options, no extension headers, no fragments,
 * and lengths that agree (R1). Everything later trusts its fields and offsets.
 */
#ifndef ISOLATOR_PACKET_H
#define ISOLATOR_PACKET_H

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/tcp.h>
#include <linux/udp.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>
#include "isolator.h"

#define HEADERS_MAX 128 /* Ethernet, IPv6, TCP with all its options */
#define ETHERNET_MIN 60 /* shorter frames come padded from real wires (IEEE 802.3 section 3.2.8) */

#define TCP_FIN 1
#define TCP_SYN 2
#define TCP_RST 4
#define TCP_PSH 8
#define TCP_ACK 16
#define TCP_URG 32

/* ICMP types (RFC 792, RFC 4443, RFC 4861) */
#define ECHO_REPLY4 0
#define UNREACHABLE4 3
#define ECHO_REQUEST4 8
#define TIME_EXCEEDED4 11
#define PARAMETER_PROBLEM4 12
#define UNREACHABLE6 1
#define PARAMETER_PROBLEM6 4
#define ECHO_REQUEST6 128
#define ECHO_REPLY6 129
#define ROUTER_SOLICITATION 133
#define ROUTER_ADVERTISEMENT 134
#define NEIGHBOUR_SOLICITATION 135
#define NEIGHBOUR_ADVERTISEMENT 136
#define REDIRECT6 137

struct icmp_header {
	__u8 type, code;
	__be16 checksum;
	__be16 id, sequence;
};

enum packet_kind { KIND_IP = 0, KIND_ARP, KIND_NEIGHBOUR, KIND_ICMP_ERROR };

struct packet {
	__u32 length;  /* of the frame */
	__u32 payload; /* bytes behind the TCP header */
	__u32 seq;
	__u32 ack;
	__u16 l4;         /* offset */
	__u16 payload_at; /* offset */
	__u16 source_port;
	__u16 destination_port;
	__u8 kind;
	__u8 protocol;
	__u8 flags; /* TCP's */
	__u8 type;  /* ICMP's */
	__u8 version;
	__u8 opens;  /* may open a flow */
	__u8 source[16] __attribute__((aligned(8)));
	__u8 destination[16] __attribute__((aligned(8)));
};

struct arp_frame {
	__be16 hardware, protocol;
	__u8 hardware_length, protocol_length;
	__be16 operation;
	__u8 sender_mac[6];
	__u8 sender[4];
	__u8 target_mac[6];
	__u8 target[4];
} __attribute__((packed));

static __always_inline void map_v4(__u8 *to, const void *from)
{
	__builtin_memset(to, 0, 10);
	to[10] = 0xff;
	to[11] = 0xff;
	__builtin_memcpy(to + 12, from, 4);
}

/* Sequence numbers compare by their signed distance (RFC 9293 section 3.4). */
static __always_inline int after(__u32 a, __u32 b)
{
	return (__s32)(a - b) > 0;
}

/* ::ffff:0:0/96 names IPv4 addresses here; on the wire it names nobody (RFC 4038 section 4.2). */
static __always_inline int is_mapped(const __u8 *address)
{
	const __u32 *words = (const __u32 *)address;

	return !words[0] && !words[1] && words[2] == bpf_htonl(0xffff);
}

static __always_inline int is_multicast_mac(const __u8 *mac)
{
	return mac[0] & 1;
}

static __always_inline int same_mac(const __u8 *a, const __u8 *b)
{
	const __u16 *x = (const __u16 *)a, *y = (const __u16 *)b;

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2];
}

static __always_inline int same_address(const __u8 *a, const __u8 *b)
{
	const __u32 *x = (const __u32 *)a, *y = (const __u32 *)b;

	return x[0] == y[0] && x[1] == y[1] && x[2] == y[2] && x[3] == y[3];
}

static __always_inline int read_arp(void *data, void *end)
{
	struct arp_frame *arp = data + ETH_HLEN;

	if ((void *)(arp + 1) > end)
		return REASON_MALFORMED;
	if (arp->hardware != bpf_htons(1) || arp->protocol != bpf_htons(ETH_P_IP) || arp->hardware_length != 6 ||
	    arp->protocol_length != 4 || (arp->operation != bpf_htons(1) && arp->operation != bpf_htons(2)))
		return REASON_MALFORMED;
	return REASON_NONE;
}

/* TCP, UDP and ICMP headers at `l4`, of `rest` bytes in all. */
static __always_inline int read_transport(void *data, void *end, struct packet *p, __u32 l4, __u32 rest)
{
	if (p->protocol == IPPROTO_TCP) {
		struct tcphdr *tcp = data + l4;
		__u32 header;

		if ((void *)(tcp + 1) > end)
			return REASON_MALFORMED;
		header = tcp->doff * 4;
		if (header < sizeof(*tcp) || header > rest)
			return REASON_MALFORMED;
		p->source_port = tcp->source;
		p->destination_port = tcp->dest;
		p->seq = bpf_ntohl(tcp->seq);
		p->ack = bpf_ntohl(tcp->ack_seq);
		p->flags = ((__u8 *)tcp)[13];
		p->payload_at = l4 + header;
		p->payload = rest - header;
		p->opens = 1;
	} else if (p->protocol == IPPROTO_UDP) {
		struct udphdr *udp = data + l4;

		if ((void *)(udp + 1) > end)
			return REASON_MALFORMED;
		p->source_port = udp->source;
		p->destination_port = udp->dest;
		p->opens = 1;
	} else if (p->protocol == IPPROTO_ICMP || p->protocol == IPPROTO_ICMPV6) {
		struct icmp_header *icmp = data + l4;

		if ((void *)(icmp + 1) > end)
			return REASON_MALFORMED;
		if ((p->protocol == IPPROTO_ICMP) != (p->version == 4))
			return REASON_PROTOCOL;
		p->type = icmp->type;
		p->source_port = p->destination_port = icmp->id;
	} else {
		p->opens = 1;
	}
	return REASON_NONE;
}

static __always_inline int classify_icmp(struct packet *p, __u8 hop_limit)
{
	if (p->version == 4) {
		if (p->type == ECHO_REQUEST4 || p->type == ECHO_REPLY4)
			p->opens = p->type == ECHO_REQUEST4;
		else if (p->type == UNREACHABLE4 || p->type == TIME_EXCEEDED4 ||
			 p->type == PARAMETER_PROBLEM4)
			p->kind = KIND_ICMP_ERROR;
		else
			return REASON_PROTOCOL;
		return REASON_NONE;
	}
	if (p->type == ECHO_REQUEST6 || p->type == ECHO_REPLY6) {
		p->opens = p->type == ECHO_REQUEST6;
	} else if (p->type >= UNREACHABLE6 && p->type <= PARAMETER_PROBLEM6) {
		p->kind = KIND_ICMP_ERROR;
	} else if (p->type >= ROUTER_SOLICITATION && p->type <= REDIRECT6) {
		if (hop_limit != 255) /* RFC 4861 section 7.1: never forwarded by a router */
			return REASON_NEIGHBOUR_SPOOF;
		p->kind = KIND_NEIGHBOUR;
	} else {
		return REASON_PROTOCOL;
	}
	return REASON_NONE;
}

static __always_inline int lengths_agree(const struct packet *p, __u32 said, int gso)
{
	__u32 there = p->length - ETH_HLEN;

	return said == there || (!gso && p->length <= ETHERNET_MIN && said < there);
}

static __always_inline int read_ipv4(void *data, void *end, struct packet *p, int gso)
{
	struct iphdr *ip = data + ETH_HLEN;
	__u32 total;
	int reason;

	if ((void *)(ip + 1) > end || ip->version != 4)
		return REASON_MALFORMED;
	if (ip->ihl != 5)
		return ip->ihl < 5 ? REASON_MALFORMED : REASON_IP_OPTIONS;
	if (ip->frag_off & bpf_htons(0x3fff)) /* offset, more fragments */
		return REASON_FRAGMENT;
	total = bpf_ntohs(ip->tot_len);
	if (total < sizeof(*ip) || !lengths_agree(p, total, gso))
		return REASON_LENGTH_MISMATCH;
	p->version = 4;
	p->protocol = ip->protocol;
	p->l4 = ETH_HLEN + sizeof(*ip);
	map_v4(p->source, &ip->saddr);
	map_v4(p->destination, &ip->daddr);
	reason = read_transport(data, end, p, ETH_HLEN + sizeof(*ip), total - sizeof(*ip));
	if (reason || p->protocol != IPPROTO_ICMP)
		return reason;
	return classify_icmp(p, ip->ttl);
}

static __always_inline int read_ipv6(void *data, void *end, struct packet *p, int gso)
{
	struct ipv6hdr *ip = data + ETH_HLEN;
	__u32 rest;
	int reason;

	if ((void *)(ip + 1) > end || ip->version != 6)
		return REASON_MALFORMED;
	rest = bpf_ntohs(ip->payload_len);
	if (!lengths_agree(p, rest + sizeof(*ip), gso))
		return REASON_LENGTH_MISMATCH;
	p->version = 6;
	p->protocol = ip->nexthdr;
	if (p->protocol == IPPROTO_FRAGMENT)
		return REASON_FRAGMENT;
	if (p->protocol == IPPROTO_HOPOPTS || p->protocol == IPPROTO_ROUTING || p->protocol == IPPROTO_DSTOPTS ||
	    p->protocol == IPPROTO_NONE || p->protocol == 135 /* mobility */ || p->protocol == 139 /* HIP */ ||
	    p->protocol == 140 /* shim6 */)
		return REASON_EXTENSION_HEADER;
	p->l4 = ETH_HLEN + sizeof(*ip);
	__builtin_memcpy(p->source, &ip->saddr, 16);
	__builtin_memcpy(p->destination, &ip->daddr, 16);
	if (is_mapped(p->source) || is_mapped(p->destination))
		return REASON_MALFORMED;
	reason = read_transport(data, end, p, ETH_HLEN + sizeof(*ip), rest);
	if (reason || p->protocol != IPPROTO_ICMPV6)
		return reason;
	return classify_icmp(p, ip->hop_limit);
}

/* Reads a frame of p->length bytes, whose headers lie in [data, end). Returns a drop reason. */
static __always_inline int read_packet(void *data, void *end, struct packet *p, int gso)
{
	struct ethhdr *eth = data;

	if ((void *)(eth + 1) > end)
		return REASON_MALFORMED;
	if (eth->h_proto == bpf_htons(ETH_P_IP))
		return read_ipv4(data, end, p, gso);
	if (eth->h_proto == bpf_htons(ETH_P_IPV6))
		return read_ipv6(data, end, p, gso);
	if (eth->h_proto == bpf_htons(ETH_P_ARP)) {
		p->kind = KIND_ARP;
		return read_arp(data, end);
	}
	if (eth->h_proto == bpf_htons(ETH_P_8021Q) || eth->h_proto == bpf_htons(ETH_P_8021AD))
		return REASON_VLAN;
	return REASON_ETHERTYPE;
}

/* The one's complement sum of TCP's pseudo header (RFC 9293 section 3.1): of what does not change, and whole, folded. A
 * mapped address's prefix, ffff, adds nothing to it. */
static __always_inline __u64 pseudo_ends(const struct packet *p)
{
	__u64 sum = bpf_htons(IPPROTO_TCP);
	int i;

#pragma clang loop unroll(disable) vectorize(disable)
	for (i = 0; i < 4; i++)
		sum += (__u64)((const __u32 *)p->source)[i] + ((const __u32 *)p->destination)[i];
	return sum;
}

/* To 16 bits, with the carries (RFC 1071 section 2). */
static __always_inline __u16 fold(__u64 sum)
{
	sum = (sum & 0xffffffff) + (sum >> 32);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	return sum;
}

static __always_inline __u16 pseudo_sum(__u64 ends, __u32 length)
{
	return fold(ends + bpf_htonl(length));
}

static __always_inline void flow_key_of(struct flow_key *key, const struct packet *p, __u32 endpoint, int direction)
{
	key->endpoint = endpoint;
	key->protocol = p->protocol;
	__builtin_memset(key->pad, 0, sizeof(key->pad));
	if (direction == EGRESS) {
		__builtin_memcpy(key->local, p->source, 16);
		__builtin_memcpy(key->remote, p->destination, 16);
		key->local_port = p->source_port;
		key->remote_port = p->destination_port;
	} else {
		__builtin_memcpy(key->local, p->destination, 16);
		__builtin_memcpy(key->remote, p->source, 16);
		key->local_port = p->destination_port;
		key->remote_port = p->source_port;
	}
}

#endif
