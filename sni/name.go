// SPDX-License-Identifier: Apache-2.0

package sni

import (
	"fmt"
	"net/netip"
	"strings"
)

// Bounds of a host name (RFC 1035, section 2.3.4): 253 bytes are 255 on the
// wire, with the first length and the root.
const (
	MaxName  = 253
	MaxLabel = 63
)

// HostName is the name that the client asks for: in lower case and without the
// root's dot. It is "" if the client sent none, or an address, which RFC 6066
// forbids: such a client is served as one without a name. It is an error if no
// host can have the name; what is wrong is then said in few printable words.
func (h *Hello) HostName() (string, error) { return HostName(h.ServerName) }

// HostName reads a name as [Hello.HostName] does.
func HostName(name string) (string, error) {
	if name == "" {
		return "", nil
	}
	if len(name) > MaxName+1 {
		return "", fmt.Errorf("has %d bytes, a host name has at most %d", len(name), MaxName)
	}
	bare := strings.TrimSuffix(name, ".")
	if isAddress(bare) {
		return "", nil
	}
	if len(bare) > MaxName {
		return "", fmt.Errorf("has %d bytes, a host name has at most %d", len(bare), MaxName)
	}
	if why := badName(bare); why != "" {
		return "", fmt.Errorf("%+.60q %s", name, why)
	}
	return strings.ToLower(bare), nil
}

// badName says what is wrong with a name, "" if nothing is: labels of letters,
// digits, hyphens and underscores, as in use (RFC 5890, section 2.3.1).
func badName(name string) string {
	label := 0
	for i := range len(name) {
		switch c := name[i]; {
		case c == '.' && label == 0:
			return "has an empty label"
		case c == '.':
			label = 0
			continue
		case c|0x20 >= 'a' && c|0x20 <= 'z', c >= '0' && c <= '9', c == '-', c == '_':
		default:
			return fmt.Sprintf("has the byte %#02x, which no host name has", c)
		}
		if label++; label > MaxLabel {
			return fmt.Sprintf("has a label of more than %d bytes", MaxLabel)
		}
	}
	if label == 0 {
		return "has an empty label"
	}
	return ""
}

// isAddress reports whether the name is an IPv4 or IPv6 address. No host name
// ends in a digit alone, begins with a bracket or has a colon, so that most names
// are not parsed.
func isAddress(name string) bool {
	if name == "" || name[0] != '[' && (name[len(name)-1] < '0' || name[len(name)-1] > '9') && !strings.Contains(name, ":") {
		return false
	}
	_, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(name, "["), "]"))
	return err == nil
}
