package servers

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Proxy forwards TCP connections to one server and disturbs them on demand.
// Every switch works on connections that are open already, too.
type Proxy struct {
	listener net.Listener
	target   string
	wg       sync.WaitGroup

	mu       sync.Mutex
	closed   bool
	conns    map[net.Conn]struct{}
	faults   faults
	captured *bytes.Buffer
}

type faults struct {
	toServer, toClient time.Duration
	blackhole, cut     bool
	loseReplies        bool
	loseReplyTo        []byte
}

// NewProxy listens on a loopback port and forwards to target.
func NewProxy(target string) (*Proxy, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, fmt.Errorf("listen for the proxy of %s: %w", target, err)
	}
	p := &Proxy{listener: l, target: target, conns: map[net.Conn]struct{}{}}
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
		p.dropConns()
	}
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
	p.dropConns()
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

func (p *Proxy) dropConns() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		_ = c.Close()
	}
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
func (p *Proxy) track(c net.Conn) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed || p.faults.cut {
		_ = c.Close()
		return false
	}
	p.conns[c] = struct{}{}
	return true
}

func (p *Proxy) forget(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.conns, c)
	_ = c.Close()
}

func (p *Proxy) serve(client net.Conn) {
	if !p.track(client) {
		return
	}
	defer p.forget(client)
	server, err := net.Dial("tcp", p.target)
	if err != nil || !p.track(server) {
		return
	}
	defer p.forget(server)

	ended := make(chan struct{}, 2)
	pipe := func(dst io.Writer, src io.Reader, pass func([]byte) bool) {
		buf := make([]byte, 64<<10)
		for {
			n, err := src.Read(buf)
			if n > 0 && pass(buf[:n]) {
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
