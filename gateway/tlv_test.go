// SPDX-License-Identifier: Apache-2.0

package gateway_test

import (
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"io"
	"maps"
	"net"
	"reflect"
	"strings"
	"testing"

	"github.com/pires/go-proxyproto"

	"github.com/tlsnat/tlsnat/gateway/config"
)

// awsHeader is what a Network Load Balancer sends of a connection through a VPC endpoint: the bytes of AWS's own test
// (aws/elastic-load-balancing-tools, Compatibility_AwsNetworkLoadBalancerTest), with a checksum, and 36 bytes of padding.
const awsHeader = "0d0a0d0a000d0a515549540a21110054ac1f0771ac1f0a1fc8f20050" + "030004e8d6892d" +
	"ea001701767063652d3038643262663135666163353030316339" + "040024" + "000000000000000000000000000000000000000000000000000000000000000000000000"

const (
	awsClient = "172.31.7.113:51442"
	awsID     = "vpce-08d2bf15fac5001c9"
)

func fromHex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// vendorTLVs are those of a header that went through all three clouds, and two more.
func vendorTLVs() []proxyproto.TLV {
	return []proxyproto.TLV{
		{Type: proxyproto.PP2_TYPE_AUTHORITY, Value: []byte("other.test")},
		{Type: 0xEA, Value: []byte("\x01" + awsID)},
		{Type: 0xE0, Value: []byte{0xff, 0xee, 0xdd, 0xcc, 0xbb, 0xaa, 0x99, 0x88}},
		{Type: 0xEE, Value: []byte{1, 0x78, 0x56, 0x34, 0x12}},
		{Type: proxyproto.PP2_TYPE_UNIQUE_ID, Value: []byte("theirs")},
		{Type: 0xE4, Value: []byte("tenant \"7\"\n")},
	}
}

// tlvFields are the fields of a line that TLVs gave it.
func tlvFields(t testing.TB, l logLine) map[string]any {
	t.Helper()
	fields := map[string]any{}
	if err := json.Unmarshal([]byte(l.text), &fields); err != nil {
		t.Fatal(err)
	}
	maps.DeleteFunc(fields, func(key string, _ any) bool {
		return key != "aws_vpce" && key != "gcp_psc" && key != "azure_link_id" && !strings.HasPrefix(key, "tlv")
	})
	return fields
}

// TestTLVsOfLoadBalancerAreForwardedAndLogged: those that the rule names, and no others, whatever the other rules of
// the port want.
func TestTLVsOfLoadBalancerAreForwardedAndLogged(t *testing.T) {
	addr, got := receiver(t)
	b := start(t, strings.ReplaceAll(`
		:{0} edge.test     -> ADDR proxy=v2 forward-tlvs=aws,gcp,azure log-tlvs=aws,gcp,azure
		:{0} a.wild.test   -> ADDR proxy=v2 forward-tlvs=all log-tlvs=all
		:{0} b.wild.test   -> ADDR proxy=v2
		:{0} c.wild.test   -> ADDR proxy=v1 log-tlvs=0x05,0xe4
		:{1}               -> ADDR proxy=v2 mode=tcp forward-tlvs=0xE4`, "ADDR", addr), "PROXY_FROM=127.0.0.1")
	header := proxyHeader(t, 2, proxySource, proxyTarget, vendorTLVs()...)
	aws, gcp, azure, tenant := "\x01"+awsID, "\xff\xee\xdd\xcc\xbb\xaa\x99\x88", "\x01\x78\x56\x34\x12", "tenant \"7\"\n"
	type sent = map[proxyproto.PP2Type]string
	decoded := map[string]any{"aws_vpce": awsID, "gcp_psc": "18441921395520346504", "azure_link_id": "305419896"}
	everything := maps.Clone(decoded)
	maps.Copy(everything, map[string]any{"tlv_0x02": hex.EncodeToString([]byte("other.test")), "tlv_0x05": hex.EncodeToString([]byte("theirs")),
		"tlv_0xe4": hex.EncodeToString([]byte(tenant))})
	for _, c := range []struct {
		name      string // of the rule; "" is the second port's
		forwarded sent
		logged    map[string]any
	}{
		{"edge.test", sent{0xEA: aws, 0xE0: gcp, 0xEE: azure}, decoded},
		{"a.wild.test", sent{0xEA: aws, 0xE0: gcp, 0xEE: azure, 0xE4: tenant}, everything},
		{"b.wild.test", sent{}, map[string]any{}},
		{"c.wild.test", nil, map[string]any{"tlv_0x05": everything["tlv_0x05"], "tlv_0xe4": everything["tlv_0xe4"]}},
		{"", sent{0xE4: tenant}, map[string]any{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn := dialBehind(t, b, c.name, header)
			exchange(t, conn, []byte("data"))
			g := <-got
			_ = conn.Close()
			l := b.lineOf(t, conn)
			l.expect(t, logLine{Outcome: "ok", Client: proxySource})
			if fields := tlvFields(t, l); !reflect.DeepEqual(fields, c.logged) {
				t.Errorf("logged %v, want %v", fields, c.logged)
			}
			if c.forwarded == nil {
				return
			}
			tlvs := g.tlvs(t)
			if tlvs[proxyproto.PP2_TYPE_UNIQUE_ID] != l.ID || tlvs[proxyproto.PP2_TYPE_AUTHORITY] != c.name {
				t.Errorf("the gateway's own are not its own any more: %q", tlvs)
			}
			maps.DeleteFunc(tlvs, func(kind proxyproto.PP2Type, _ string) bool { return kind < 0xE0 })
			if !reflect.DeepEqual(tlvs, c.forwarded) {
				t.Errorf("forwarded %q, want %q", tlvs, c.forwarded)
			}
		})
	}
}

// dialBehind is a client of the rule for a name, or of the second port, behind a load balancer that sends the header.
func dialBehind(t testing.TB, b *bed, name string, header []byte) net.Conn {
	t.Helper()
	c := b.dial(t, bit(name == ""))
	if _, err := c.Write(header); err != nil {
		t.Fatal(err)
	}
	if name == "" {
		return c
	}
	return tls.Client(c, clientConfig(t, func(config *tls.Config) { config.ServerName = name }))
}

// TestVPCEndpointOfAWSIsDecoded from the bytes that AWS documents, as they are in its own tests.
func TestVPCEndpointOfAWSIsDecoded(t *testing.T) {
	addr, got := receiver(t)
	b := start(t, ":{0} -> "+addr+" mode=tcp proxy=v2 forward-tlvs=aws log-tlvs=aws", "PROXY_FROM=127.0.0.1")
	c := b.dial(t, 0)
	_, _ = c.Write(fromHex(t, awsHeader))
	exchange(t, c, []byte("data"))
	if id := (<-got).tlvs(t)[0xEA]; id != "\x01"+awsID {
		t.Errorf("forwarded: %q", id)
	}
	_ = c.Close()
	l := b.lineOf(t, c)
	l.expect(t, logLine{Client: awsClient})
	if fields := tlvFields(t, l); !reflect.DeepEqual(fields, map[string]any{"aws_vpce": awsID}) {
		t.Errorf("logged %v", fields)
	}
}

// TestTLVsAreOnlyWhatTheyShouldBe: what is not as its vendor writes it is logged as it is, what comes twice is in one
// field, what is too much is left out and counted, and what a load balancer says of itself is of no client.
func TestTLVsAreOnlyWhatTheyShouldBe(t *testing.T) {
	b := start(t, ":{0} -> "+echoServer(t)+" mode=tcp log-tlvs=all", "PROXY_FROM=127.0.0.1")
	tlv := func(kind proxyproto.PP2Type, value string) proxyproto.TLV {
		return proxyproto.TLV{Type: kind, Value: []byte(value)}
	}
	for name, c := range map[string]struct {
		header []byte
		want   map[string]any
	}{
		"not as the vendors write them": {proxyHeader(t, 2, proxySource, proxyTarget, tlv(0xEA, "\x01vpce-\"\n,\"outcome\":\"x"), tlv(0xE0, "7 bytes"), tlv(0xEE, "\x02abcd")),
			map[string]any{"tlv_0xea": hex.EncodeToString([]byte("\x01vpce-\"\n,\"outcome\":\"x")), "tlv_0xe0": hex.EncodeToString([]byte("7 bytes")), "tlv_0xee": hex.EncodeToString([]byte("\x02abcd"))}},
		"twice": {proxyHeader(t, 2, proxySource, proxyTarget, tlv(0xEA, "\x01vpce-a"), tlv(0xE4, "x"), tlv(0xEA, "\x01vpce-b"), tlv(0xE4, "")),
			map[string]any{"aws_vpce": "vpce-a,vpce-b", "tlv_0xe4": "78,"}},
		"too much": {proxyHeader(t, 2, proxySource, proxyTarget, tlv(0xE4, strings.Repeat("x", 506)), tlv(0xE5, "y"), tlv(0xE6, "zz"), tlv(0xE7, "")),
			map[string]any{"tlv_0xe4": strings.Repeat("78", 506), "tlv_0xe7": "", "tlvs_dropped": 2.0}},
		"LOCAL":      {localWith(t, tlv(0xE4, "x")), map[string]any{}},
		"version 1":  {proxyHeader(t, 1, proxySource, proxyTarget), map[string]any{}},
		"no TLV":     {proxyHeader(t, 2, proxySource, proxyTarget), map[string]any{}},
		"IPv6":       {proxyHeader(t, 2, "[2001:db8::7]:1", "[2001:db8::1]:2", tlv(0xE4, "x")), map[string]any{"tlv_0xe4": "78"}},
		"only noise": {proxyHeader(t, 2, proxySource, proxyTarget, tlv(4, "xxxx")), map[string]any{}},
	} {
		t.Run(name, func(t *testing.T) {
			conn := b.dial(t, 0)
			_, _ = conn.Write(c.header)
			exchange(t, conn, []byte("data"))
			_ = conn.Close()
			if fields := tlvFields(t, b.lineOf(t, conn)); !reflect.DeepEqual(fields, c.want) {
				t.Errorf("logged %v, want %v", fields, c.want)
			}
		})
	}
}

// localWith is the header of a load balancer's own connection, with a TLV.
func localWith(t testing.TB, tlv proxyproto.TLV) []byte {
	t.Helper()
	h := proxyproto.Header{Version: 2, Command: proxyproto.LOCAL, TransportProtocol: proxyproto.UNSPEC}
	if err := h.SetTLVs([]proxyproto.TLV{tlv}); err != nil {
		t.Fatal(err)
	}
	b, err := h.Format()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestTLVsOfStrangersAreNotLogged: a client that is no load balancer of ours can't say where it comes from.
func TestTLVsOfStrangersAreNotLogged(t *testing.T) {
	b := start(t, ":{0} edge.test -> demo log-tlvs=all", "PROXY_FROM=192.0.2.0/24")
	c := b.dial(t, 0)
	_, _ = c.Write(proxyHeader(t, 2, proxySource, proxyTarget, vendorTLVs()...))
	_, _ = io.ReadAll(c)
	_ = c.Close()
	l := b.lineOf(t, c)
	l.expect(t, logLine{Outcome: "bad_proxy", Client: c.LocalAddr().String()})
	if fields := tlvFields(t, l); len(fields) > 0 {
		t.Errorf("logged %v", fields)
	}
}

// TestTLVsWithoutALoadBalancerAreWarnedOf: nobody's header is believed, so there are none.
func TestTLVsWithoutALoadBalancerAreWarnedOf(t *testing.T) {
	for setting, want := range map[string]int{"PROXY_FROM=": 1, "PROXY_FROM=10.0.0.0/8": 0} {
		s, err := config.ReadSettings([]string{config.Prefix + "MAP=:1 -> 10.0.0.1:1 mode=tcp log-tlvs=aws", config.Prefix + setting})
		if err != nil {
			t.Fatal(err)
		}
		_, problems := config.Read(s)
		if problems.Errors() || len(problems) != want || want == 1 && !strings.Contains(problems.String(), ":1:27: log-tlvs= does nothing: ") {
			t.Errorf("%s: %v", setting, problems)
		}
	}
}
