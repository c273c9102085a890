// Command kubernetes is a whole Kubernetes in one executable: the unchanged upstream programs, started under
// the name the executable is called by (or named by its first argument), and a kubelet that needs no cgroups.
// One executable instead of six shares most of its code, so it builds and links once.
package main

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	_ "time/tzdata" // CronJobs may name a time zone, and the host may have no zone files.

	_ "k8s.io/client-go/plugin/pkg/client/auth"           // kubectl's ways to log in
	_ "k8s.io/component-base/logs/json/register"          // --logging-format=json
	_ "k8s.io/component-base/metrics/prometheus/clientgo" // client metrics of every component
	_ "k8s.io/component-base/metrics/prometheus/version"  // version metric of every component
)

func programs() map[string]func() {
	return map[string]func(){
		"cri-descriptor":          printRuntimeInterface,
		"etcd":                    runEtcd,
		"kube-apiserver":          runAPIServer,
		"kube-controller-manager": runControllerManager,
		"kube-scheduler":          runScheduler,
		"kubectl":                 runKubectl,
		"kubelet":                 runKubelet,
	}
}

func main() {
	known := programs()
	if run, ok := known[filepath.Base(os.Args[0])]; ok {
		run()
		return
	}
	if len(os.Args) > 1 {
		if run, ok := known[os.Args[1]]; ok {
			os.Args = os.Args[1:]
			run()
			return
		}
	}
	names := slices.Sorted(maps.Keys(known))
	fmt.Fprintf(os.Stderr, "error: call this program by one of the names %s, or give one as its first argument\n",
		strings.Join(names, ", "))
	os.Exit(2)
}
