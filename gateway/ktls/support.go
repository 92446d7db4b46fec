// SPDX-License-Identifier: Apache-2.0

package ktls

import (
	"crypto/tls"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// Kind is a TLS version with a cipher: what the kernel can carry or not.
type Kind uint8

// The kinds. Their order is that of Kind.cipher within a version.
const (
	TLS12AES128 Kind = iota
	TLS12AES256
	TLS12ChaCha20
	TLS13AES128
	TLS13AES256
	TLS13ChaCha20
	kinds
)

// Kinds are all of them.
func Kinds() []Kind {
	return []Kind{TLS12AES128, TLS12AES256, TLS12ChaCha20, TLS13AES128, TLS13AES256, TLS13ChaCha20}
}

// KindOf is the kind of a cipher suite, if package record carries it.
func KindOf(suite uint16) (Kind, bool) {
	switch suite {
	case tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256:
		return TLS12AES128, true
	case tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384, tls.TLS_ECDHE_RSA_WITH_AES_256_GCM_SHA384:
		return TLS12AES256, true
	case tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_ECDHE_RSA_WITH_CHACHA20_POLY1305_SHA256:
		return TLS12ChaCha20, true
	case tls.TLS_AES_128_GCM_SHA256:
		return TLS13AES128, true
	case tls.TLS_AES_256_GCM_SHA384:
		return TLS13AES256, true
	case tls.TLS_CHACHA20_POLY1305_SHA256:
		return TLS13ChaCha20, true
	}
	return 0, false
}

// suite is one of the kind.
func (k Kind) suite() uint16 {
	return [kinds]uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256, tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
		tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256, tls.TLS_AES_128_GCM_SHA256, tls.TLS_AES_256_GCM_SHA384,
		tls.TLS_CHACHA20_POLY1305_SHA256}[k]
}

// TLS13 says whether the version is 1.3.
func (k Kind) TLS13() bool { return k >= TLS13AES128 }

func (k Kind) version() uint16 {
	if k.TLS13() {
		return tls.VersionTLS13
	}
	return tls.VersionTLS12
}

func (k Kind) cipher() uint16 {
	return [...]uint16{cipherAES128GCM, cipherAES256GCM, cipherChaCha20}[k%TLS13AES128]
}

func (k Kind) infoLen() int {
	if k.cipher() == cipherAES128GCM {
		return maxInfoLen - 16
	}
	return maxInfoLen
}

// String is such as "1.3 AES-128-GCM".
func (k Kind) String() string {
	return strings.TrimPrefix(tls.VersionName(k.version()), "TLS ") + " " +
		[...]string{"AES-128-GCM", "AES-256-GCM", "ChaCha20-Poly1305"}[k%TLS13AES128]
}

// Support is what a kernel carries, by what was tried.
type Support struct {
	// Absent says why the kernel carries nothing at all; nil if it carries something.
	Absent error
	// Rekey says whether keys can be replaced (Linux 6.14 and newer), both ways.
	Rekey bool
	// Mended says whether no fault is known in how this kernel parses the records that strangers send.
	Mended bool

	tx, rx [kinds]error
}

// ErrCipher is for suites that the kernel has no cipher for, or not one that passed.
var ErrCipher = errors.New("the kernel does not carry this cipher")

// TX is nil if the kernel seals records of the suite, else why it does not.
func (s *Support) TX(suite uint16) error { return s.says(&s.tx, suite) }

// RX is nil if the kernel opens records of the suite, else why it does not.
func (s *Support) RX(suite uint16) error { return s.says(&s.rx, suite) }

func (s *Support) says(way *[kinds]error, suite uint16) error {
	if s.Absent != nil {
		return s.Absent
	}
	k, ok := KindOf(suite)
	if !ok {
		return ErrCipher
	}
	if way[k] != nil {
		return fmt.Errorf("%w: %s: %w", ErrCipher, k, way[k])
	}
	return nil
}

// Probe tries every version and cipher in each direction, over the loopback interface: sizes around the limit of a
// record, written, spliced, compared byte for byte with what package record seals and opens, and a close_notify. It
// takes some milliseconds. Where the module is not loaded it loads it, if the process may (CAP_NET_ADMIN).
func Probe() *Support {
	s := &Support{Mended: mended(release())}
	if s.Absent = attachable(); s.Absent != nil {
		return s
	}
	works := false
	for _, k := range Kinds() {
		s.tx[k], s.rx[k] = try(k, trySealing), try(k, tryOpening)
		works = works || s.tx[k] == nil || s.rx[k] == nil
	}
	if !works {
		s.Absent = fmt.Errorf("no cipher passed its test: %w", s.tx[TLS13AES128])
		return s
	}
	s.Rekey = try(TLS13AES128, tryNewTX) == nil && try(TLS13AES128, tryNewRX) == nil
	return s
}

// The first Linux without a known fault in how its TLS receives. CVE-2025-39682 and CVE-2025-39946 were mended in 6.17,
// CVE-2025-40176 in 6.18, and CVE-2026-23414, which came with that mend, in 7.0. Distributions mend older kernels too, but
// the version doesn't tell.
const mendedMajor, mendedMinor = 7, 0

// mended reads a release such as "6.12.48+deb13-cloud-amd64". What it can't read is not mended, nor is a preview of the
// first version that is.
func mended(release string) bool {
	var major, minor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return false
	}
	if major == mendedMajor && minor == mendedMinor {
		return !strings.Contains(release, "-rc")
	}
	return major > mendedMajor || major == mendedMajor && minor > mendedMinor
}

// release is the running kernel's.
func release() string {
	var name unix.Utsname
	if unix.Uname(&name) != nil {
		return ""
	}
	return unix.ByteSliceToString(name.Release[:])
}

// attachable says why the TLS layer can't be put on a socket.
func attachable() error {
	p, err := newPair()
	if err != nil {
		return err
	}
	defer p.close()
	switch err := Attach(p.kernel); err {
	case nil:
		return nil
	case unix.ENOENT:
		return errors.New("the kernel's module tls is not loaded, or not there; 'modprobe tls' loads it")
	default:
		return fmt.Errorf("TCP_ULP: %w", err)
	}
}

// String is one line on what is carried: "all, new keys too", or what is not and why.
func (s *Support) String() string {
	if s.Absent != nil {
		return "not used: " + s.Absent.Error()
	}
	var faults []string
	for _, k := range Kinds() {
		for _, way := range []struct {
			name string
			err  error
		}{{"TX", s.tx[k]}, {"RX", s.rx[k]}} {
			if way.err != nil {
				faults = append(faults, fmt.Sprintf("not %s %s (%v)", way.name, k, way.err))
			}
		}
	}
	text := "works"
	if len(faults) > 0 {
		text += ", but " + strings.Join(faults, ", ")
	}
	if s.Rekey {
		text += "; keys can be renewed"
	} else {
		text += "; keys can't be renewed (Linux 6.14 could), so TLS 1.3 is opened in user space"
	}
	if !s.Mended {
		text += fmt.Sprintf("; faults are known in how it opens records (before Linux %d.%d), so it opens them only with TLSNAT_KTLS=rx or ktls=rx",
			mendedMajor, mendedMinor)
	}
	return text
}
