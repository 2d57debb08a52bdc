// Package bounded keeps what others say from filling the memory of the process, which
// serves every mount of the plugin, and from doing anything on the terminal of whoever
// reads it. It imports nothing of the engine.
package bounded

import (
	"errors"
	"io"
	"net"
	"strings"
	"sync/atomic"
	"unicode"
)

// ErrTooMuch ends an answer that has more than any that was asked for.
var ErrTooMuch = errors.New("the answer is larger than any that is read")

// Budget is how much may still be read of answers that belong together.
type Budget struct{ left atomic.Int64 }

// NewBudget returns a Budget of n bytes.
func NewBudget(n int64) *Budget {
	b := &Budget{}
	b.left.Store(n)
	return b
}

// Spend takes n bytes, or says that there are none left.
func (b *Budget) Spend(n int) error {
	if b.left.Add(-int64(n)) < 0 {
		return ErrTooMuch
	}
	return nil
}

// Body is body, of which at most most bytes are read, and no more than is left of all.
func Body(body io.ReadCloser, most int64, all *Budget) io.ReadCloser {
	return &limited{ReadCloser: body, own: NewBudget(most), all: all}
}

type limited struct {
	io.ReadCloser
	own, all *Budget
}

func (l *limited) Read(p []byte) (int, error) {
	n, err := l.ReadCloser.Read(p)
	for _, b := range []*Budget{l.own, l.all} {
		if over := b.Spend(n); over != nil {
			return 0, over
		}
	}
	return n, err
}

// Conn is c, which ends when the other side has said more than most bytes.
func Conn(c net.Conn, most int64) net.Conn { return &conn{Conn: c, budget: NewBudget(most)} }

type conn struct {
	net.Conn
	budget *Budget
}

func (c *conn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if over := c.budget.Spend(n); over != nil {
		_ = c.Close()
		return 0, over
	}
	return n, err
}

// Line is a text of somebody else on one line, without what a terminal would act on:
// what cannot be printed, and what is no UTF-8, becomes a question mark.
func Line(text string) string {
	text = strings.ToValidUTF8(text, "?")
	if !strings.ContainsFunc(text, unprintable) {
		return text
	}
	return strings.Map(func(r rune) rune {
		if unprintable(r) {
			return '?'
		}
		return r
	}, text)
}

// unprintable are control characters, and what changes the direction of text or has no
// width.
func unprintable(r rune) bool { return !unicode.IsPrint(r) }
