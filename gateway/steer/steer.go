// SPDX-License-Identifier: Apache-2.0

// Package steer has one listening socket serve many ports: a BPF program of type sk_lookup, attached to the network
// namespace, hands the first packet of a connection to a listener that is bound elsewhere (Linux 5.9;
// Documentation/bpf/prog_sk_lookup.rst).
//
//	s := &steer.Steering{}
//	p, err := steer.Load([]steer.Span{{Lo: 10000, Hi: 59999, To: 0}}, []int32{fd})
//	err = s.Set(p)
//	p.Close()
//	...
//	err = s.Close()
//
// The socket that accepts such a connection has the port that the client has connected to (getsockname(2)). Where the
// socket belongs to a group (SO_REUSEPORT) the kernel chooses one of the group, as ever.
//
// The program is the table: it is written anew for each set of spans, without a map to look ports up in, and takes the
// place of the one before in one step. It holds nothing but a socket for each listener. What it attaches is not pinned
// and ends with the process. It needs CAP_BPF and CAP_NET_ADMIN.
//
// The package does not listen, and does not know who else does: Listening tells.
package steer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Span are the ports Lo to Hi of a local address; the zero Addr is every address that has no span of its own for the
// port.
type Span struct {
	Addr   netip.Addr
	Lo, Hi uint16
	To     int // which of the listeners; Own: whoever is bound there
}

// Own leaves ports alone that would be steered otherwise.
const Own = -1

// Program is what Load has made for Set.
type Program struct {
	bpf *ebpf.Program
	ns  int // a listener of the network namespace to attach it to
}

// Load makes the program that steers the spans, which don't overlap on an address. listeners are descriptors of
// listening sockets; for a dual-stack address of IPv4 as well as IPv6. Nothing is steered yet.
func Load(spans []Span, listeners []int32) (*Program, error) {
	p, err := load(spans, listeners)
	if err != nil {
		return nil, err
	}
	return &Program{p, int(listeners[0])}, nil
}

// Close lets go of a program that is not Set, or has been.
func (p *Program) Close() { _ = p.bpf.Close() }

// Steering is what is attached to a network namespace. The zero value is nothing. It is not for concurrent use.
type Steering struct {
	link *link.NetNsLink
}

// Set steers as the program says from here on. After an error everything is as it was.
func (s *Steering) Set(p *Program) error {
	if s.link != nil {
		if err := s.link.Update(p.bpf); err != nil {
			return fmt.Errorf("replace the sk_lookup program: %w", err)
		}
		return nil
	}
	ns, err := namespaceOf(p.ns)
	if err != nil {
		return fmt.Errorf("find the network namespace: %w", err)
	}
	defer unix.Close(ns)
	if s.link, err = link.AttachNetNs(ns, p.bpf); err != nil {
		return fmt.Errorf("attach the sk_lookup program: %w", err)
	}
	return nil
}

// Close steers nothing any more.
func (s *Steering) Close() error {
	if s.link == nil {
		return nil
	}
	err := s.link.Close()
	s.link = nil
	return err
}

// namespaceOf is a descriptor of the network namespace that a socket is in: the process's, which /proc would tell as
// well where it is mounted.
func namespaceOf(fd int) (int, error) { return unix.IoctlRetInt(fd, unix.SIOCGSKNS) }

// Others is how many sk_lookup programs of others are attached where the program is, or would be. All of them are
// asked about a packet, and the last one that names a socket decides.
func (s *Steering) Others(p *Program) int {
	ns, err := namespaceOf(p.ns)
	if err != nil {
		return 0
	}
	defer unix.Close(ns)
	r, err := link.QueryPrograms(link.QueryOptions{Target: ns, Attach: ebpf.AttachSkLookup})
	if err != nil {
		return 0
	}
	n := len(r.Programs)
	if s.link != nil {
		n--
	}
	return max(0, n)
}

// Probe says why steering can't work here, or nil. It loads a program that steers nothing, and attaches it nowhere.
var Probe = sync.OnceValue(func() error {
	p, err := load([]Span{{Lo: 1, Hi: 1, To: 0}}, nil)
	if err != nil {
		return err
	}
	return p.Close()
})

// Reason says in the operator's words what an error of Probe or Set comes from, and what to do.
func Reason(err error) string {
	_, rejected := errors.AsType[*ebpf.VerifierError](err)
	switch {
	case rejected: // the program is at fault, whatever the number of the error
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return "the right is missing: give the process CAP_BPF and CAP_NET_ADMIN, and the system call bpf(2)"
	case errors.Is(err, ebpf.ErrNotSupported), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL):
		return "the kernel has no sk_lookup: it needs Linux 5.9 with CONFIG_BPF_SYSCALL and CONFIG_BPF_STREAM_PARSER"
	case errors.Is(err, unix.ENOMEM):
		return "the limit of locked memory is too low, before Linux 5.11: raise LimitMEMLOCK= or ulimit -l"
	}
	return err.Error()
}

// load makes the program, with a socket of each listener's group in its map.
func load(spans []Span, listeners []int32) (*ebpf.Program, error) {
	sockets, err := ebpf.NewMap(&ebpf.MapSpec{Name: "tlsnat_listen", Type: ebpf.SockMap, KeySize: 4, ValueSize: 4,
		MaxEntries: uint32(max(1, len(listeners)))})
	if err != nil {
		return nil, fmt.Errorf("make a sockmap: %w", err)
	}
	defer sockets.Close() // the program holds it
	for i, fd := range listeners {
		if err := sockets.Put(uint32(i), uint32(fd)); err != nil {
			return nil, fmt.Errorf("put a listener into a sockmap: %w", err)
		}
	}
	instructions, err := write(spans, sockets.FD())
	if err != nil {
		return nil, err
	}
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: "tlsnat_steer", Type: ebpf.SkLookup, AttachType: ebpf.AttachSkLookup,
		Instructions: instructions, License: "Apache-2.0"})
	if err != nil {
		return nil, fmt.Errorf("load the sk_lookup program: %w", err)
	}
	return p, nil
}

// Offsets in struct bpf_sk_lookup (linux/bpf.h). Addresses are as in a packet, the port is a number.
const (
	ctxFamily   = 8
	ctxProtocol = 12
	ctxLocalIP4 = 40
	ctxLocalIP6 = 44
	ctxPort     = 60
)

const (
	regContext = asm.R6
	regPort    = asm.R7
	regKey     = asm.R8 // which listener; then its socket
	regWord    = asm.R2 // of the local address, the first of four
)

// verdictPass goes on with the socket that was assigned, or with the kernel's own lookup if none was.
const verdictPass = 1

// maxInstructions keeps every jump within its 16 bits, and the verifier's work far from its limit. It is room for
// ten thousand spans.
const maxInstructions = 30000

// writer writes a program.
type writer struct {
	asm.Instructions
	label string // of the instruction that comes next
	n     int    // labels made
}

func (w *writer) emit(all ...asm.Instruction) {
	for _, i := range all {
		if w.label != "" {
			i, w.label = i.WithSymbol(w.label), ""
		}
		w.Instructions = append(w.Instructions, i)
	}
}

func (w *writer) newLabel() string {
	w.n++
	return fmt.Sprint("at", w.n)
}

const (
	labelPass   = "pass"
	labelAssign = "assign"
	labelEvery  = "every"
)

func listenerLabel(to int) string {
	if to == Own {
		return labelPass
	}
	return fmt.Sprint("listener", to)
}

// write writes the program:
//
//	not TCP → pass
//	the address is one that has spans of its own → its tree, and where that has no such port → every
//	every: the tree of the spans for every address; no such port → pass
//	listener N: key = N → assign
//	assign: the socket at the key, if it is still there
//	pass
func write(spans []Span, sockets int) (asm.Instructions, error) {
	w := &writer{}
	w.emit(asm.Mov.Reg(regContext, asm.R1),
		asm.LoadMem(asm.R0, regContext, ctxProtocol, asm.Word),
		asm.JNE.Imm(asm.R0, unix.IPPROTO_TCP, labelPass))
	byAddr := map[netip.Addr][]Span{}
	for _, s := range spans {
		byAddr[s.Addr] = append(byAddr[s.Addr], s)
	}
	w.addresses(byAddr)
	w.label = labelEvery
	w.tree(byAddr[netip.Addr{}], labelPass)
	if w.listeners(spans) {
		w.assign(sockets)
	}
	w.label = labelPass
	w.emit(asm.Mov.Imm(asm.R0, verdictPass), asm.Return())
	if len(w.Instructions) > maxInstructions {
		return nil, fmt.Errorf("%d separate ranges are too many for a program", len(spans))
	}
	return w.Instructions, nil
}

// addresses finds the tree of the packet's local address.
func (w *writer) addresses(byAddr map[netip.Addr][]Span) {
	var own [2][]netip.Addr // IPv4, IPv6
	for a := range byAddr {
		if a.IsValid() {
			own[(a.BitLen()-32)/96] = append(own[(a.BitLen()-32)/96], a)
		}
	}
	if len(own[0])+len(own[1]) == 0 {
		return // every comes next
	}
	label := map[netip.Addr]string{}
	six := w.newLabel()
	w.emit(asm.LoadMem(asm.R0, regContext, ctxFamily, asm.Word), asm.JNE.Imm(asm.R0, unix.AF_INET, six))
	for family, base := range [2]int16{ctxLocalIP4, ctxLocalIP6} {
		if family == 1 {
			w.label = six
		}
		slices.SortFunc(own[family], netip.Addr.Compare)
		w.find(own[family], base, label)
	}
	for _, addrs := range own {
		for _, a := range addrs {
			w.label = label[a]
			w.tree(byAddr[a], labelEvery)
		}
	}
}

// find goes to the label of the local address, which it makes, or to every.
func (w *writer) find(addrs []netip.Addr, base int16, label map[netip.Addr]string) {
	for i, a := range addrs {
		words := words(a)
		if i == 0 {
			for n := range words {
				w.emit(asm.LoadMem(regWord+asm.Register(n), regContext, base+int16(4*n), asm.Word))
			}
		}
		label[a] = w.newLabel()
		other := w.newLabel()
		for n, word := range words {
			w.emit(asm.JNE.Imm32(regWord+asm.Register(n), int32(word), other))
		}
		w.emit(asm.Ja.Label(label[a]))
		w.label = other
	}
	w.emit(asm.Ja.Label(labelEvery))
}

// words are the address as the program loads it: one word, or four.
func words(a netip.Addr) (all []uint32) {
	for b := a.AsSlice(); len(b) > 0; b = b[4:] {
		all = append(all, binary.NativeEndian.Uint32(b))
	}
	return all
}

// tree finds the span of the port by halves. It loads the port anew, so that the verifier, who knows what it was
// compared with on the way, looks at each tree once and not once for each way to it.
func (w *writer) tree(spans []Span, none string) {
	spans = slices.Clone(spans)
	slices.SortFunc(spans, func(a, b Span) int { return int(a.Lo) - int(b.Lo) })
	w.emit(asm.LoadMem(regPort, regContext, ctxPort, asm.Word))
	w.branch(spans, none)
}

func (w *writer) branch(spans []Span, none string) {
	if len(spans) == 0 {
		w.emit(asm.Ja.Label(none))
		return
	}
	middle := len(spans) / 2
	s, below, above := spans[middle], none, none
	if middle > 0 {
		below = w.newLabel()
	}
	if middle+1 < len(spans) {
		above = w.newLabel()
	}
	w.emit(asm.JLT.Imm(regPort, int32(s.Lo), below), asm.JGT.Imm(regPort, int32(s.Hi), above), asm.Ja.Label(listenerLabel(s.To)))
	if middle > 0 {
		w.label = below
		w.branch(spans[:middle], none)
	}
	if middle+1 < len(spans) {
		w.label = above
		w.branch(spans[middle+1:], none)
	}
}

// listeners are the targets of the trees, each once, if there are any: the verifier refuses what can't be reached.
func (w *writer) listeners(spans []Span) bool {
	seen := map[int]bool{Own: true}
	for _, s := range spans {
		if !seen[s.To] {
			seen[s.To] = true
			w.label = listenerLabel(s.To)
			w.emit(asm.Mov.Imm(regKey, int32(s.To)), asm.Ja.Label(labelAssign))
		}
	}
	return len(seen) > 1
}

// assign hands the packet to the listener. Without flags the kernel goes on to choose one of its group.
func (w *writer) assign(sockets int) {
	const slot = -4 // of the stack
	w.label = labelAssign
	w.emit(asm.StoreMem(asm.RFP, slot, regKey, asm.Word),
		asm.LoadMapPtr(asm.R1, sockets),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, slot),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, labelPass),
		asm.Mov.Reg(regKey, asm.R0),
		asm.Mov.Reg(asm.R1, regContext), asm.Mov.Reg(asm.R2, regKey), asm.Mov.Imm(asm.R3, 0),
		asm.FnSkAssign.Call(),
		asm.Mov.Reg(asm.R1, regKey),
		asm.FnSkRelease.Call())
}
