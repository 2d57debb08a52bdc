package servers

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"net"
	"sync"
	"time"
)

// Proxy forwards TCP connections to one server and disturbs them on demand.
// Every switch works on connections that are open already, too.
type Proxy struct {
	listener net.Listener
	target   string
	owner    func(client, here net.Addr) string
	wg       sync.WaitGroup

	mu       sync.Mutex
	closed   bool
	conns    map[net.Conn]*party
	faults   faults
	isolated int // what Isolate has kept from its way
	captured *bytes.Buffer
}

// party is who has the client's end of a connection. That is found out when it
// matters, and asked again until it is known.
type party struct {
	client, here net.Addr
	mu           sync.Mutex
	name         string
}

func (p *Proxy) ownerOf(who *party) string {
	who.mu.Lock()
	defer who.mu.Unlock()
	if who.name == "" {
		who.name = p.owner(who.client, who.here)
	}
	return who.name
}

type faults struct {
	toServer, toClient time.Duration
	blackhole, cut     bool
	isolated           string // owner
	silent             bool
	loseReplies        bool
	loseReplyTo        []byte
}

// NewProxy listens on a loopback port and forwards to target.
func NewProxy(target string) (*Proxy, error) {
	return NewOwnedProxy(target, func(net.Addr, net.Addr) string { return "" })
}

// NewOwnedProxy is NewProxy for clients of several owners, which owner tells from
// the two ends of a client's connection; Isolate disturbs those of one of them.
func NewOwnedProxy(target string, owner func(client, here net.Addr) string) (*Proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for the proxy of %s: %w", target, err)
	}
	p := &Proxy{listener: l, target: target, owner: owner, conns: map[net.Conn]*party{}}
	p.wg.Go(p.accept)
	return p, nil
}

// Addr is where the proxy listens.
func (p *Proxy) Addr() string { return p.listener.Addr().String() }

// Target is the address that the proxy forwards to.
func (p *Proxy) Target() string { return p.target }

// SetLatency delays what goes to the server and what comes back.
func (p *Proxy) SetLatency(toServer, toClient time.Duration) {
	p.set(func(f *faults) { f.toServer, f.toClient = toServer, toClient })
}

// Blackhole makes the proxy accept connections and swallow what it reads: the
// server hears nothing, the client waits.
func (p *Proxy) Blackhole(on bool) { p.set(func(f *faults) { f.blackhole = on }) }

// LoseReplies forwards requests and drops the answers.
func (p *Proxy) LoseReplies(on bool) { p.set(func(f *faults) { f.loseReplies = on }) }

// LoseReplyTo forwards everything until a request holds text (in any case of
// letters); from then on LoseReplies is on.
func (p *Proxy) LoseReplyTo(text string) {
	p.set(func(f *faults) { f.loseReplyTo = bytes.ToLower([]byte(text)) })
}

// Cut closes every connection, and every new one as soon as it is made.
func (p *Proxy) Cut(on bool) {
	p.set(func(f *faults) { f.cut = on })
	if on {
		p.dropConns("")
	}
}

// Isolate cuts the connections of one owner, those that it makes from now on
// included. When silent, they stay open and nothing arrives, as when a cable is
// pulled.
func (p *Proxy) Isolate(owner string, silent bool) {
	p.set(func(f *faults) { f.isolated, f.silent = owner, silent })
	if !silent {
		dropped := p.dropConns(owner)
		p.mu.Lock()
		defer p.mu.Unlock()
		p.isolated += dropped
	}
}

// Rejoin ends Isolate, and says how many connections or messages that has kept from
// their way. Connections that have lost something end.
func (p *Proxy) Rejoin() (kept int) {
	p.mu.Lock()
	owner := p.faults.isolated
	p.faults.isolated = ""
	kept, p.isolated = p.isolated, 0
	p.mu.Unlock()
	if owner != "" {
		p.dropConns(owner)
	}
	return kept
}

// Heal switches every fault off.
func (p *Proxy) Heal() { p.set(func(f *faults) { *f = faults{} }) }

// Capture starts to record what clients send; the function it returns ends
// that and returns the record.
func (p *Proxy) Capture() (stop func() []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	record := &bytes.Buffer{}
	p.captured = record
	return func() []byte {
		p.mu.Lock()
		defer p.mu.Unlock()
		if p.captured == record {
			p.captured = nil
		}
		return record.Bytes()
	}
}

// Close ends the proxy and waits for its goroutines.
func (p *Proxy) Close() error {
	p.mu.Lock()
	p.closed = true
	p.mu.Unlock()
	err := p.listener.Close()
	p.dropConns("")
	p.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (p *Proxy) set(change func(*faults)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(&p.faults)
}

// dropConns closes the connections of owner, of every one when it is "", and says
// how many they were.
func (p *Proxy) dropConns(owner string) (dropped int) {
	p.mu.Lock()
	conns := maps.Clone(p.conns)
	p.mu.Unlock()
	for c, who := range conns {
		if owner == "" || p.ownerOf(who) == owner {
			_ = c.Close()
			dropped++
		}
	}
	return dropped
}

func (p *Proxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		p.wg.Go(func() { p.serve(client) })
	}
}

// track registers c so that Cut and Close can end it. It reports false, and
// closes c, where connections are not wanted now.
func (p *Proxy) track(c net.Conn, who *party) bool {
	shut := p.isolates(who, false)
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.faults.cut || shut {
		_ = c.Close()
		return false
	}
	p.conns[c] = who
	return true
}

// isolates reports whether who is cut off, in the one way or the other.
func (p *Proxy) isolates(who *party, silent bool) bool {
	p.mu.Lock()
	f := p.faults
	p.mu.Unlock()
	if f.isolated == "" || f.silent != silent || p.ownerOf(who) != f.isolated {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.isolated++
	return true
}

func (p *Proxy) forget(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
	_ = c.Close()
}

func (p *Proxy) serve(client net.Conn) {
	who := &party{client: client.RemoteAddr(), here: client.LocalAddr()}
	if !p.track(client, who) {
		return
	}
	defer p.forget(client)
	server, err := net.Dial("tcp", p.target)
	if err != nil || !p.track(server, who) {
		return
	}
	defer p.forget(server)

	ended := make(chan struct{}, 2)
	pipe := func(dst io.Writer, src io.Reader, pass func([]byte) bool) {
		buf := make([]byte, 64<<10)
		for {
			n, err := src.Read(buf)
			if n > 0 && p.isolates(who, false) { // one that was being made when it was cut
				err = net.ErrClosed
			} else if n > 0 && pass(buf[:n]) && !p.isolates(who, true) {
				if _, werr := dst.Write(buf[:n]); werr != nil {
					err = werr
				}
			}
			if err != nil {
				ended <- struct{}{}
				return
			}
		}
	}
	p.wg.Go(func() { pipe(server, client, p.passRequest) })
	p.wg.Go(func() { pipe(client, server, p.passReply) })
	<-ended
}

func (p *Proxy) passRequest(data []byte) bool {
	p.mu.Lock()
	f := p.faults
	if p.captured != nil {
		p.captured.Write(data)
	}
	if len(f.loseReplyTo) > 0 && bytes.Contains(bytes.ToLower(data), f.loseReplyTo) {
		p.faults.loseReplies = true
	}
	p.mu.Unlock()
	pause(f.toServer)
	return !f.blackhole
}

func (p *Proxy) passReply([]byte) bool {
	p.mu.Lock()
	f := p.faults
	p.mu.Unlock()
	pause(f.toClient)
	return !f.blackhole && !f.loseReplies
}

func pause(d time.Duration) {
	if d > 0 {
		<-time.After(d)
	}
}
