// Command cnitool drives a CNI configuration list through libcni, as container runtimes do, for
// tests (tests/support/cnitool.py builds and caches it).
//
//	cnitool add|check|del|gc|status CONFLIST [CONTAINERID NETNS IFNAME]
//
// CNI_PATH, CNI_CACHE and CNI_ARGS are those of the runtime; CAP_ARGS is a JSON object of
// capability arguments (portMappings, bandwidth, …). The result of add goes to stdout; an error
// object of a plugin goes to stderr as JSON, and the exit status is 1.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		var told *types.Error
		if !errors.As(err, &told) {
			told = &types.Error{Code: 0, Msg: err.Error()}
		}
		_ = json.NewEncoder(os.Stderr).Encode(told)
		os.Exit(1)
	}
}

func run(arguments []string) error {
	if len(arguments) < 2 {
		return errors.New("usage: cnitool COMMAND CONFLIST [CONTAINERID NETNS IFNAME]")
	}
	list, err := libcni.ConfListFromFile(arguments[1])
	if err != nil {
		return err
	}
	network := libcni.NewCNIConfigWithCacheDir(
		filepath.SplitList(os.Getenv("CNI_PATH")), os.Getenv("CNI_CACHE"), nil)
	ctx := context.Background()
	switch arguments[0] {
	case "status":
		return network.GetStatusNetworkList(ctx, list)
	case "gc":
		return network.GCNetworkList(ctx, list, &libcni.GCArgs{})
	}
	attachment, err := parse(arguments[2:])
	if err != nil {
		return err
	}
	switch arguments[0] {
	case "add":
		result, err := network.AddNetworkList(ctx, list, attachment)
		if err != nil {
			return err
		}
		return result.PrintTo(os.Stdout)
	case "check":
		return network.CheckNetworkList(ctx, list, attachment)
	case "del":
		return network.DelNetworkList(ctx, list, attachment)
	}
	return fmt.Errorf("unknown command %q", arguments[0])
}

func parse(arguments []string) (*libcni.RuntimeConf, error) {
	if len(arguments) != 3 {
		return nil, errors.New("expected CONTAINERID NETNS IFNAME")
	}
	conf := &libcni.RuntimeConf{
		ContainerID: arguments[0], NetNS: arguments[1], IfName: arguments[2],
	}
	for _, pair := range strings.Split(os.Getenv("CNI_ARGS"), ";") {
		if key, value, found := strings.Cut(pair, "="); found {
			conf.Args = append(conf.Args, [2]string{key, value})
		}
	}
	if text := os.Getenv("CAP_ARGS"); text != "" {
		if err := json.Unmarshal([]byte(text), &conf.CapabilityArgs); err != nil {
			return nil, fmt.Errorf("CAP_ARGS: %w", err)
		}
	}
	return conf, nil
}
