package consumer

import "testing"

func testPolicy(t *testing.T, w *world) { t.Helper(); _ = w }
