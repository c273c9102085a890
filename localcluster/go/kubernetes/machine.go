package main

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"
	"time"

	cadvisor "github.com/google/cadvisor/info/v1"
	cadvisorv2 "github.com/google/cadvisor/info/v2"
	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	cadvisortest "k8s.io/kubernetes/pkg/kubelet/cadvisor/testing"
	"k8s.io/kubernetes/pkg/kubelet/cm"
)

// localMachine answers what the kubelet asks cAdvisor about the node with the figures of the real machine. What
// cAdvisor would know of each container's cgroup comes empty from the embedded fake.
type localMachine struct {
	cadvisortest.Fake
	root string // a directory on the file system that pods write to
}

// MachineInfo gives cores, memory in bytes, and identities.
func (m *localMachine) MachineInfo() (*cadvisor.MachineInfo, error) {
	var system unix.Sysinfo_t
	if err := unix.Sysinfo(&system); err != nil {
		return nil, fmt.Errorf("sysinfo: %w", err)
	}
	bootID, err := readTrimmed("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return nil, err
	}
	unit := uint64(system.Unit)
	return &cadvisor.MachineInfo{
		Timestamp:      time.Now(),
		NumCores:       runtime.NumCPU(), // honours a CPU affinity mask, as taskset sets it
		MemoryCapacity: uint64(system.Totalram) * unit,
		SwapCapacity:   uint64(system.Totalswap) * unit,
		BootID:         bootID,
		MachineID:      bootID, // /etc/machine-id may be missing; nothing here outlives a boot
		SystemUUID:     bootID,
	}, nil
}

// ContainerInfoV2 gives CPU time and memory of the whole machine as those of the root container: from them the
// kubelet makes its summary, without which it neither notices pressure nor enforces the size limits of volumes.
func (m *localMachine) ContainerInfoV2(
	name string, options cadvisorv2.RequestOptions,
) (map[string]cadvisorv2.ContainerInfo, error) {
	if name != "/" {
		return m.Fake.ContainerInfoV2(name, options)
	}
	system, err := procfs.NewDefaultFS()
	if err != nil {
		return nil, err
	}
	memory, err := system.Meminfo()
	if err != nil {
		return nil, err
	}
	processors, err := system.Stat()
	if err != nil {
		return nil, err
	}
	return map[string]cadvisorv2.ContainerInfo{name: rootContainer(memory, processors)}, nil
}

func rootContainer(memory procfs.Meminfo, processors procfs.Stat) cadvisorv2.ContainerInfo {
	total := *memory.MemTotalBytes
	cpu := processors.CPUTotal
	busySeconds := cpu.User + cpu.Nice + cpu.System + cpu.IRQ + cpu.SoftIRQ + cpu.Steal
	return cadvisorv2.ContainerInfo{
		Spec: cadvisorv2.ContainerSpec{
			CreationTime: time.Unix(int64(processors.BootTime), 0),
			HasCpu:       true,
			HasMemory:    true,
			Memory:       cadvisorv2.MemorySpec{Limit: total},
		},
		Stats: []*cadvisorv2.ContainerStats{{
			Timestamp: time.Now(),
			Cpu:       &cadvisor.CpuStats{Usage: cadvisor.CpuUsage{Total: uint64(busySeconds * 1e9)}},
			Memory: &cadvisor.MemoryStats{
				Usage:      total - *memory.MemFreeBytes,
				WorkingSet: total - *memory.MemAvailableBytes, // what page reclaim can not give back
			},
		}},
	}
}

// VersionInfo gives the kernel and operating system that `kubectl get nodes -o wide` shows.
func (m *localMachine) VersionInfo() (*cadvisor.VersionInfo, error) {
	kernel, err := readTrimmed("/proc/sys/kernel/osrelease")
	if err != nil {
		return nil, err
	}
	return &cadvisor.VersionInfo{KernelVersion: kernel, ContainerOsVersion: osName()}, nil
}

// RootFsInfo is the file system that holds the volumes of pods.
func (m *localMachine) RootFsInfo() (cadvisorv2.FsInfo, error) { return m.GetDirFsInfo(m.root) }

// ImagesFsInfo is the same one: images are programs of the machine.
func (m *localMachine) ImagesFsInfo(context.Context) (cadvisorv2.FsInfo, error) {
	return m.GetDirFsInfo(m.root)
}

// ContainerFsInfo is the same one: containers have no writable layer.
func (m *localMachine) ContainerFsInfo(context.Context) (cadvisorv2.FsInfo, error) {
	return m.GetDirFsInfo(m.root)
}

// GetDirFsInfo gives bytes and inodes of the file system that holds path.
func (m *localMachine) GetDirFsInfo(path string) (cadvisorv2.FsInfo, error) {
	var stat unix.Statfs_t
	if err := unix.Statfs(path, &stat); err != nil {
		return cadvisorv2.FsInfo{}, fmt.Errorf("statfs %s: %w", path, err)
	}
	size := uint64(stat.Bsize)
	return cadvisorv2.FsInfo{
		Timestamp:  time.Now(),
		Device:     "root",
		Mountpoint: path,
		Capacity:   stat.Blocks * size,
		Available:  stat.Bavail * size,
		Usage:      (stat.Blocks - stat.Bfree) * size,
		Inodes:     &stat.Files,
		InodesFree: &stat.Ffree,
	}, nil
}

// containerManager is upstream's stub, which manages no cgroups, with the real size of the disk: the stub's
// zero would make every pod that requests ephemeral storage unschedulable.
type containerManager struct {
	cm.ContainerManager
	machine *localMachine
}

func newContainerManager(machine *localMachine) cm.ContainerManager {
	return &containerManager{ContainerManager: cm.NewStubContainerManager(), machine: machine}
}

func (c *containerManager) GetCapacity(localStorageCapacityIsolation bool) v1.ResourceList {
	disk, err := c.machine.RootFsInfo()
	if err != nil || !localStorageCapacityIsolation {
		return c.ContainerManager.GetCapacity(localStorageCapacityIsolation)
	}
	return v1.ResourceList{
		v1.ResourceEphemeralStorage: *resource.NewQuantity(int64(disk.Capacity), resource.BinarySI),
	}
}

// GetPodCgroupRoot is where all pods are: with no cgroup of their own, in the root with the rest of the machine.
func (c *containerManager) GetPodCgroupRoot() string { return "/" }

func osName() string {
	release, err := os.ReadFile("/etc/os-release")
	if err == nil {
		for line := range strings.Lines(string(release)) {
			if name, ok := strings.CutPrefix(line, "PRETTY_NAME="); ok {
				return strings.Trim(name, "\"\n")
			}
		}
	}
	return "Linux"
}

func readTrimmed(path string) (string, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	return strings.TrimSpace(string(content)), nil
}
