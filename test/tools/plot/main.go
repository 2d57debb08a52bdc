// Command plot draws what test/bench has measured: a plot in JSON on stdin, an SVG
// in the file that is its argument.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"image/color"
	"math"
	"os"
	"strconv"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/plotutil"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
)

// figure is plot of test/bench.
type figure struct {
	Title, X, Y string
	Log         bool
	Labels      []string
	Lines       []line
	Limit       *struct {
		Name string
		Y    float64
	}
}

type line struct {
	Name      string
	X, Y      []float64
	Low, High []float64
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: plot FILE.svg <FIGURE.json")
		os.Exit(2)
	}
	if err := drawTo(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "plot:", err)
		os.Exit(1)
	}
}

func drawTo(file string) error {
	var f figure
	if err := json.NewDecoder(os.Stdin).Decode(&f); err != nil {
		return err
	}
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = f.Title, f.X, f.Y
	p.Title.Padding, p.Legend.Top, p.Legend.Left = vg.Points(8), true, true
	p.Add(plotter.NewGrid())
	if f.Log {
		p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	}
	width, height := 16*vg.Centimeter, 9*vg.Centimeter
	var err error
	if len(f.Labels) > 0 {
		height = vg.Length(len(f.Labels))*vg.Centimeter + 3*vg.Centimeter
		err = bars(p, f)
	} else {
		err = lines(p, f)
	}
	if err != nil {
		return err
	}
	picture, err := p.WriterTo(width, height, "svg")
	if err != nil {
		return err
	}
	var text bytes.Buffer
	if _, err := picture.WriteTo(&text); err != nil {
		return err
	}
	return os.WriteFile(file, bytes.ReplaceAll(text.Bytes(), []byte(font), []byte(font+fallback)), 0o600)
}

// Who has not the font that a plot is set in is told of those that are as wide.
const (
	font     = "font-family:Liberation Serif"
	fallback = ",Times New Roman,Times,serif"
)

// bars lie, so that what they are called can be read. Each shows its value, and
// between what its rounds were.
func bars(p *plot.Plot, f figure) error {
	p.X.Label.Text, p.Y.Label.Text = f.Y, ""
	if f.Log {
		p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
		p.Y.Scale, p.Y.Tick.Marker = plot.LinearScale{}, plot.DefaultTicks{}
	}
	n, most, least := len(f.Labels), 0.0, math.Inf(1)
	thick := vg.Points(14) / vg.Length(len(f.Lines))
	for which, l := range f.Lines {
		for i, v := range l.Y {
			// From above, as they were given.
			y := float64(n-1-i) + (float64(len(f.Lines)-1)/2-float64(which))*0.7/float64(len(f.Lines))
			from := 0.0
			if f.Log {
				from = smallest(f) / 3
			}
			bar, err := plotter.NewLine(plotter.XYs{{X: from, Y: y}, {X: v, Y: y}})
			if err != nil {
				return err
			}
			bar.Color, bar.Width = plotutil.Color(which), thick
			p.Add(bar)
			if i == 0 && l.Name != "" {
				p.Legend.Add(l.Name, bar)
			}
			high := v
			if len(l.High) > i && len(l.Low) > i {
				spread, err := plotter.NewLine(plotter.XYs{{X: l.Low[i], Y: y}, {X: l.High[i], Y: y}})
				if err != nil {
					return err
				}
				spread.Color, spread.Width = color.Black, vg.Points(1)
				p.Add(spread)
				high = l.High[i]
			}
			if err := label(p, " "+figures(v), high, y); err != nil {
				return err
			}
			most, least = max(most, high), min(least, from)
		}
	}
	if f.Limit != nil {
		if err := across(p, f, plotter.XYs{{X: f.Limit.Y, Y: -0.6}, {X: f.Limit.Y, Y: float64(n) - 0.4}}); err != nil {
			return err
		}
		most = max(most, f.Limit.Y)
	}
	p.X.Min, p.X.Max, p.Y.Min, p.Y.Max = least, most*1.15, -0.6, float64(n)-0.4
	if f.Log {
		p.X.Max = most * 3
	}
	ticks := make(plot.ConstantTicks, n)
	for i, name := range f.Labels {
		ticks[i] = plot.Tick{Value: float64(n - 1 - i), Label: name}
	}
	p.Y.Tick.Marker = ticks
	if len(f.Lines) > 1 {
		p.Legend.Top, p.Legend.Left = false, false
	}
	return nil
}

func smallest(f figure) float64 {
	least := math.Inf(1)
	for _, l := range f.Lines {
		for _, v := range l.Y {
			if v > 0 {
				least = min(least, v)
			}
		}
	}
	return least
}

func label(p *plot.Plot, text string, x, y float64) error {
	labels, err := plotter.NewLabels(plotter.XYLabels{XYs: plotter.XYs{{X: x, Y: y}}, Labels: []string{text}})
	if err != nil {
		return err
	}
	labels.TextStyle[0].YAlign = draw.YCenter
	p.Add(labels)
	return nil
}

func across(p *plot.Plot, f figure, at plotter.XYs) error {
	l, err := plotter.NewLine(at)
	if err != nil {
		return err
	}
	l.Color, l.Dashes = color.Gray{Y: 90}, []vg.Length{vg.Points(4), vg.Points(3)}
	p.Add(l)
	p.Legend.Add(f.Limit.Name, l)
	return nil
}

// lines go over numbers that each are ten times the one before.
func lines(p *plot.Plot, f figure) error {
	p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, plot.LogTicks{Prec: -1}
	left, right := math.Inf(1), 0.0
	for which, l := range f.Lines {
		points := make(plotter.XYs, len(l.Y))
		for i := range points {
			points[i] = plotter.XY{X: l.X[i], Y: l.Y[i]}
			left, right = min(left, l.X[i]), max(right, l.X[i])
		}
		line, dots, err := plotter.NewLinePoints(points)
		if err != nil {
			return err
		}
		line.Color, dots.Color, dots.Shape = plotutil.Color(which), plotutil.Color(which), draw.CircleGlyph{}
		line.Width = vg.Points(1.5)
		p.Add(line, dots)
		if l.Name != "" {
			p.Legend.Add(l.Name, line, dots)
		}
		for i, at := range points {
			if err := label(p, "  "+figures(l.Y[i]), at.X, at.Y); err != nil {
				return err
			}
		}
	}
	if f.Limit != nil {
		if err := across(p, f, plotter.XYs{{X: left, Y: f.Limit.Y}, {X: right, Y: f.Limit.Y}}); err != nil {
			return err
		}
	}
	if !f.Log {
		p.Y.Min = 0
		p.Y.Max *= 1.15
	}
	return nil
}

// figures are as many as are known.
func figures(v float64) string {
	switch {
	case v >= 100:
		return strconv.FormatFloat(v, 'f', 0, 64)
	case v >= 10:
		return strconv.FormatFloat(v, 'f', 1, 64)
	}
	return strconv.FormatFloat(v, 'g', 2, 64)
}
