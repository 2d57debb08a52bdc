package postgresql

import (
	"context"
	"encoding/binary"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/connection"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/backend/kind"
	"github.com/harmonyflow/vault-plugin-secrets-harmonyflow/test/servers"
)

// said is one message of a server.
func said(of byte, body string) string {
	return string(of) + string(binary.BigEndian.AppendUint32(nil, uint32(len(body)+4))) + body
}

// TestHostileServer: a server that announces gigabytes, never stops, asks for the
// password itself, or has it computed for hours costs bounded memory and time, and an
// error that says nothing of what it was sent.
func TestHostileServer(t *testing.T) {
	in := said('R', "\x00\x00\x00\x0aSCRAM-SHA-256\x00\x00")
	welcome := said('R', "\x00\x00\x00\x00") + said('K', "\x00\x00\x00\x01\x00\x00\x00\x01") + said('Z', "I")
	row := said('D', "\x00\x01\x00\x00\x00\x04"+"aaaa")
	for name, c := range map[string]struct {
		servers.Hostile
		says string
	}{
		"a message of two gigabytes": {servers.Hostile{Begins: "R\x7f\xff\xff\xff"}, "more than is read"},
		"one that it also sends":     {servers.Hostile{Begins: "E\x7f\xff\xff\xff", GoesOn: strings.Repeat("x", 64)}, "more than is read"},
		"a negative length":          {servers.Hostile{Begins: "R\xff\xff\xff\xff"}, ""},
		"notices without an end":     {servers.Hostile{GoesOn: said('N', "SNOTICE\x00M"+strings.Repeat("more", 2000)+"\x00\x00")}, ""},
		"parameters without an end":  {servers.Hostile{GoesOn: said('S', strings.Repeat("k", 10000)+"\x00v\x00")}, ""},
		"rows without an end":        {servers.Hostile{Begins: welcome + said('1', "") + said('2', "") + said('T', "\x00\x01a\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x19\xff\xff\xff\xff\xff\xff\x00\x00"), GoesOn: row}, ""},
		"a row of two gigabytes":     {servers.Hostile{Begins: welcome + said('1', "") + said('2', "") + "D\x7f\xff\xff\xff", GoesOn: "x"}, "more than is read|with any password"},
		"the password itself":        {servers.Hostile{Begins: said('R', "\x00\x00\x00\x03")}, ""},
		"two billion iterations":     {servers.Hostile{Begins: in + said('R', "\x00\x00\x00\x0br=x,s=QSXCR+Q6sek8bf92,i=2000000000")}, ""},
		"a byte at a time":           {servers.Hostile{Begins: "R\x00\x00\x10\x00", GoesOn: "x", Pause: 50 * time.Millisecond}, ""},
		"nothing":                    {servers.Hostile{}, "did not answer"},
		"another protocol":           {servers.Hostile{GoesOn: "HTTP/1.1 200 OK\r\n"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			host, port, _ := strings.Cut(c.Start(t), ":")
			e := &connection.Entry{
				Name: "db", PostgreSQL: &connection.PostgreSQL{URL: "host=" + host + " port=" + port + " dbname=app sslmode=disable user={{username}} password={{password}}"},
				Admin: connection.NewAdmin(kind.Material{Username: "admin", Secret: "its-password"}),
			}
			require.NoError(t, ValidateConfig(e.PostgreSQL, e.TLS))
			const deadline = 4 * time.Second
			ctx, cancel := context.WithTimeout(t.Context(), deadline)
			defer cancel()
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			began := time.Now()
			_, err := Verify(ctx, e)
			took := time.Since(began)
			runtime.ReadMemStats(&after)
			require.Error(t, err)
			require.Regexp(t, c.says, err.Error())
			require.NotContains(t, err.Error(), "its-password")
			require.Less(t, took, 2*deadline)
			require.Less(t, after.TotalAlloc-before.TotalAlloc, uint64(16*maxHeard))
		})
	}
}
