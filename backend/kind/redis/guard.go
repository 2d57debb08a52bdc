package redis

import (
	"errors"
	"net"
	"strconv"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/bounded"
)

// Bounds on what a node says: far more than the largest answer that is asked for, which
// is the list of its clients.
const (
	maxReply   = 32 << 20 // of memory, for one reply
	maxSession = 64 << 20 // for all of a session
	maxDepth   = 16       // of lists within lists
	maxNumber  = 20       // digits of what a header announces
	maxLine    = 64 << 10 // of a status or an error, which may repeat what was sent

	element = 16 // bytes of a list for each of its elements
)

// errStrange: what answers does not speak the second version of the protocol.
var errStrange = errors.New("the answer is none of redis")

// guard follows what a node says and ends a connection on which it says too much.
// go-redis makes room for what a reply announces before any of it is there, and reads
// lists within lists by recursion: a few bytes would cost the process all of its
// memory, or its stack, and with it every mount of the plugin.
type guard struct {
	net.Conn
	replies
}

func guarded(c net.Conn) net.Conn { return &guard{Conn: c, replies: replies{left: maxSession}} }

func (g *guard) Read(p []byte) (int, error) {
	n, err := g.Conn.Read(p)
	if wrong := g.follow(p[:n]); wrong != nil {
		_ = g.Close()
		return 0, wrong
	}
	return n, err
}

// replies is how far a dialogue is.
type replies struct {
	open   []int  // what is still to come of each list that has begun, the innermost last
	head   []byte // the beginning of a line
	long   bool   // the line is a text that goes on
	size   int    // of it, so far
	cr     bool   // it ended with a carriage return so far
	skip   int    // of a text whose length was announced
	reply  int    // what the reply under way takes
	left   int    // of the session
	failed error
}

func (r *replies) follow(p []byte) error {
	for len(p) > 0 && r.failed == nil {
		if r.skip > 0 {
			n := min(r.skip, len(p))
			p = p[n:]
			if r.skip -= n; r.skip == 0 {
				r.ended()
			}
			continue
		}
		r.next(p[0])
		p = p[1:]
	}
	return r.failed
}

// next takes one byte of a line.
func (r *replies) next(b byte) {
	r.take(1)
	if r.size++; r.size > maxLine {
		r.failed = bounded.ErrTooMuch
	}
	switch {
	case b == '\n' && r.cr:
		r.line()
		r.head, r.size, r.long, r.cr = r.head[:0], 0, false, false
		return
	case r.long:
	case len(r.head) == 0:
		r.head = append(r.head, b)
		r.long = b == '+' || b == '-'
		if !r.long && b != ':' && b != '$' && b != '*' {
			r.failed = errStrange
		}
	case b != '\r' && len(r.head) > maxNumber:
		r.failed = errStrange
	case b != '\r':
		r.head = append(r.head, b)
	}
	r.cr = b == '\r'
}

// line is called at the end of one.
func (r *replies) line() {
	if r.failed != nil {
		return
	}
	if r.head[0] != '$' && r.head[0] != '*' {
		r.ended()
		return
	}
	n, err := strconv.Atoi(string(r.head[1:]))
	switch {
	case err != nil || n < -1:
		r.failed = errStrange
	case n == -1 || n == 0 && r.head[0] == '*':
		r.ended()
	case r.head[0] == '$':
		r.take(n)
		r.skip = n + len("\r\n")
	case len(r.open) == maxDepth || n > maxReply/element:
		r.failed = bounded.ErrTooMuch
	default:
		r.take(n * element)
		r.open = append(r.open, n)
	}
}

// take counts what go-redis makes room for.
func (r *replies) take(n int) {
	if n > maxReply-r.reply || n > r.left {
		r.failed = bounded.ErrTooMuch
		return
	}
	r.reply += n
	r.left -= n
}

// ended is called when a reply, or one within a list, has ended.
func (r *replies) ended() {
	for n := len(r.open); n > 0; n = len(r.open) {
		if r.open[n-1]--; r.open[n-1] > 0 {
			return
		}
		r.open = r.open[:n-1]
	}
	r.reply = 0
}
